//! Undoing one entry. What isn't there counts as undone.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Entry;
use crate::sys::{self, Process};

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

/// When process `pid` started, as a number that tells it from a later one of the same pid; `None` if
/// there is none.
pub fn start_time(pid: u32) -> Option<u64> {
    sys::start_time(pid)
}

/// Kills the process unless its number has passed to another, and waits for its end. It has
/// `grace` to end by itself.
fn end_process(pid: u32, started: u64, grace: Duration) -> io::Result<()> {
    let Some(process) = Process::open(pid)? else {
        return Ok(());
    };
    // Compared while the process is held on to, so it can't change in between.
    if start_time(pid) != Some(started) {
        return Ok(());
    }
    if process.ends_within(grace)? {
        return Ok(());
    }
    process.kill()?;
    if process.ends_within(PATIENCE)? {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        "still there after SIGKILL",
    ))
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
