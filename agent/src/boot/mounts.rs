//! The file systems of the guest itself.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use crate::cgroup;
use crate::error::Error;

/// Type, place, flags and options, in order.
fn table() -> [(&'static str, &'static str, MsFlags, &'static str); 6] {
    let locked = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    [
        ("proc", "/proc", locked, ""),
        ("sysfs", "/sys", locked, ""),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "mode=0620,ptmxmode=0666,gid=5",
        ),
        (
            "tmpfs",
            "/run",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=0755",
        ),
        ("cgroup2", cgroup::ROOT, locked, "nsdelegate"),
    ]
}

/// Mounts everything, and opens the way for containers' own roots.
pub(super) fn mount_all() -> Result<(), Error> {
    leave_rootfs()?;
    for (fstype, target, flags, options) in table() {
        make(target)?;
        mount(Some(fstype), target, Some(fstype), flags, Some(options))
            .map_err(Error::file("mount", target))?;
    }
    // The agent is the last that the kernel may kill for want of memory.
    write("/proc/self/oom_score_adj", "-1000")?;
    delegate_controllers()
}

/// pivot_root(2), by which containers get their root, refuses to work on the initial rootfs. A bind
/// mount of it, with this process's root moved there, is as good as any file system.
fn leave_rootfs() -> Result<(), Error> {
    const NEW: &str = "/run";
    make(NEW)?;
    mount(Some("/"), NEW, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(Error::file("bind / to", NEW))?;
    chdir(NEW).map_err(Error::file("enter", NEW))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(Error::file("move to /", NEW))?;
    chroot(".").map_err(Error::file("make the root", NEW))?;
    chdir("/").map_err(Error::file("enter", "/"))
}

/// Lets containers have every controller that the kernel has.
fn delegate_controllers() -> Result<(), Error> {
    let path = Path::new(cgroup::ROOT).join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    let enabled: Vec<_> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    write(
        Path::new(cgroup::ROOT).join("cgroup.subtree_control"),
        enabled.join(" "),
    )
}

fn make(path: &str) -> Result<(), Error> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::file("create", path)(error))
        }
        _ => Ok(()),
    }
}

fn write(path: impl AsRef<Path>, text: impl AsRef<[u8]>) -> Result<(), Error> {
    let path = path.as_ref();
    fs::write(path, text).map_err(Error::file("write", path))
}
