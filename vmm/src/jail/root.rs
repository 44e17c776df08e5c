//! A root directory with nothing in it.

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot, pivot_root};

use super::{Refused, step};

/// Any directory that each host has: the empty root is mounted over it, in a mount namespace of
/// the caller's own.
const SPOT: &str = "/proc";

/// The only inode is the root directory's, there is one block, and nobody may look.
const EMPTY: &str = "size=4k,nr_inodes=1,mode=0";

const NONE: Option<&str> = None;

/// Leaves the process an empty, read-only root. It must be in a mount namespace of its own.
pub(super) fn empty() -> Result<(), Refused> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(step("keep mounts to the process"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), SPOT, Some("tmpfs"), flags, Some(EMPTY))
        .map_err(step("mount an empty tmpfs"))?;
    chdir(SPOT).map_err(step("enter the empty root"))?;
    match pivot_root(".", ".") {
        // The old root now lies over the new one, pivot_root(2).
        Ok(()) => umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the host's root"))?,
        // The host runs from its initramfs, which can't be pivoted away from.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)
                .map_err(step("move the empty root"))?;
            chroot(".").map_err(step("change to the empty root"))?;
        }
        Err(errno) => return Err(step("pivot to the empty root")(errno)),
    }
    chdir("/").map_err(step("enter the empty root"))
}
