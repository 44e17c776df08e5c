//! Linux.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags, linkat, memfd_create};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A file in `directory` that no name leads to.
pub(crate) fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(File::from(file))
}

/// Gives a file of [`nameless`] the name `path`, which must be free.
pub(crate) fn publish(file: &File, path: &Path) -> io::Result<()> {
    let own = own_path(file);
    Ok(linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// Has a file of [`nameless`] go when it is closed; nobody opens it by its path any more.
pub(crate) fn forget(_: &File) -> io::Result<()> {
    Ok(())
}

/// Opens an open file again, for reading alone.
pub(crate) fn reopen(file: &File) -> io::Result<File> {
    File::open(own_path(file))
}

/// A path to an open file that holds for this process's children as well.
pub(crate) fn path_for_children(file: &File) -> io::Result<PathBuf> {
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Ok(path.into())
}

/// The path of an open file, as far as it has one.
pub(crate) fn path_of(file: &File) -> io::Result<PathBuf> {
    std::fs::read_link(own_path(file))
}

/// A path by which this process can open an open file again.
fn own_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// A file in memory.
pub(crate) fn memory(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?))
}

/// Mounts an overlay of `directories`, topmost first, read-only over `stage`, where this thread
/// alone sees it.
pub(crate) fn mount_merged(directories: &[PathBuf], stage: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    // By descriptor the option is short: all of a mount's options must fit into one page. They
    // are opened here because the directories must lie in the namespace they are mounted in.
    let layers = directories
        .iter()
        .map(File::open)
        .collect::<io::Result<Vec<_>>>()?;
    let lower: Vec<String> = layers.iter().map(own_path).collect();
    let options = CString::new(format!("lowerdir={}", lower.join(":")))?;
    let options = Some(options.as_c_str());
    Ok(mount(
        "overlay",
        stage,
        "overlay",
        MountFlags::RDONLY,
        options,
    )?)
}

/// Bytes of the host's memory.
pub(crate) fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(
        clippy::unnecessary_cast,
        reason = "a c_ulong, which isn't u64 everywhere"
    )]
    let total = info.totalram as u64;
    total.saturating_mul(u64::from(info.mem_unit))
}

/// Another process, held on to: its number can't pass to another.
#[derive(Debug)]
pub(crate) struct Process(OwnedFd);

impl Process {
    /// The process with this number, if there is one.
    pub(crate) fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match pidfd_open(number, PidfdFlags::empty()) {
            Ok(process) => Ok(Some(Self(process))),
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for its end; answers whether it came in time.
    pub(crate) fn ends_within(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)) {
                // The shim hears of its children by a signal.
                Err(Errno::INTR) => {}
                other => return Ok(other? > 0),
            }
        }
    }

    /// Kills it. One that has ended is fine.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// This program, whatever has become of its file.
pub(crate) const PROGRAM: Option<&str> = Some("/proc/self/exe");

/// Has this process, and what it executes, killed when the thread of `parent` that started it ends.
pub(crate) fn end_with(parent: u32) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before.
    let now = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    match u32::try_from(now) == Ok(parent) {
        true => Ok(()),
        false => Err(io::Error::other("its parent has ended")),
    }
}

/// The processor time that process `pid` has used, in the kernel's clock ticks.
pub(crate) fn processor_time(pid: u32) -> u64 {
    // proc_pid_stat(5): fields 14 and 15, of the program and of the kernel for it.
    let times = stat(pid, 11).zip(stat(pid, 12));
    times.map_or(0, |(user, system)| user.saturating_add(system))
}

/// When process `pid` started, in the kernel's clock ticks since boot; `None` if there is none.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    // proc_pid_stat(5): field 22.
    stat(pid, 19)
}

/// A number of `/proc/pid/stat`; the field after the name's is 0.
fn stat(pid: u32, field: usize) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold any character.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(field)?.parse().ok()
}
