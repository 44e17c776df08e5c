//! Undoing one entry. What isn't there counts as undone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Entry;

/// How long a killed process, and then its cgroup, may take to go.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a logger may go on after the last output. containerd gives a clean-up 5 s in all.
const LOGGING: Duration = Duration::from_secs(4);

pub(super) fn undo(entry: &Entry) -> Result<(), String> {
    match entry {
        Entry::Directory { path } => {
            absent_is_fine(std::fs::remove_dir(path)).map_err(|error| named(path, &error))
        }
        Entry::File { path } => {
            absent_is_fine(std::fs::remove_file(path)).map_err(|error| named(path, &error))
        }
        Entry::Tree { path } => {
            absent_is_fine(std::fs::remove_dir_all(path)).map_err(|error| named(path, &error))
        }
        Entry::Child { pid, start_time } => end_process(*pid, *start_time, Duration::ZERO)
            .map_err(|error| format!("process {pid}: {error}")),
        Entry::Logger { pid, start_time } => end_process(*pid, *start_time, LOGGING)
            .map_err(|error| format!("logger {pid}: {error}")),
        Entry::Cgroup { path } => remove_cgroup(path).map_err(|error| named(path, &error)),
        Entry::Poststop(hooks) => {
            hooks.run();
            Ok(())
        }
    }
}

fn named(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

pub(super) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// When process `pid` started, in the kernel's clock ticks since boot; `None` if there is none.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the name, field 2, is in parentheses and may hold any character; the
    // start time is field 22.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Kills the process unless its number has passed to another, and waits for its end. It has
/// `grace` to end by itself.
fn end_process(pid: u32, started: u64, grace: Duration) -> io::Result<()> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let process = match pidfd_open(number, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        other => other?,
    };
    // Compared while the descriptor holds on to the process, so it can't change in between.
    if start_time(pid) != Some(started) {
        return Ok(());
    }
    if ends_within(&process, grace)? {
        return Ok(());
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Err(Errno::SRCH) => return Ok(()),
        other => other?,
    }
    if ends_within(&process, PATIENCE)? {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        "still there after SIGKILL",
    ))
}

/// Waits for a process's end; `false`: it has not ended within `limit`.
pub(crate) fn ends_within(process: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            // The shim hears of its children by a signal.
            Err(Errno::INTR) => {}
            other => return Ok(other? > 0),
        }
    }
}

fn remove_cgroup(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match absent_is_fine(std::fs::remove_dir(path)) {
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
                    && Instant::now() < deadline =>
            {
                // A process that has just ended may still be counted; cgroup v1 tells nobody when
                // that is over, so ask again.
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}
