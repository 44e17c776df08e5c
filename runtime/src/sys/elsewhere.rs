//! macOS.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sha2::{Digest, Sha256};

/// How long to wait before a process is looked for again. No descriptor stands for one here.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A file in `directory` with a name that nobody else uses. A process that is killed leaves it.
pub(crate) fn nameless(directory: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!(".new-{}-{number}", std::process::id());
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(directory.join(name))
}

/// Gives a file of [`nameless`] the name `path`, which must be free.
pub(crate) fn publish(file: &File, path: &Path) -> io::Result<()> {
    std::fs::hard_link(path_for_children(file)?, path)?;
    forget(file)
}

/// Has a file of [`nameless`] go when it is closed; nobody opens it by its path any more.
pub(crate) fn forget(file: &File) -> io::Result<()> {
    std::fs::remove_file(path_for_children(file)?)
}

/// Opens an open file again, for reading alone.
pub(crate) fn reopen(file: &File) -> io::Result<File> {
    File::open(path_for_children(file)?)
}

/// A path to an open file.
pub(crate) fn path_for_children(file: &File) -> io::Result<PathBuf> {
    path_of(file)
}

/// The path of an open file.
pub(crate) fn path_of(file: &File) -> io::Result<PathBuf> {
    let path = rustix::fs::getpath(file)?;
    Ok(std::ffi::OsString::from_vec(path.into_bytes()).into())
}

/// A file that is gone when it is closed.
pub(crate) fn memory(_: &str) -> io::Result<File> {
    let file = nameless(&std::env::temp_dir())?;
    forget(&file)?;
    Ok(file)
}

/// There are no overlays here: layers come as images of their own.
pub(crate) fn mount_merged(_: &[PathBuf], _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Bytes of the host's memory; 0 if it doesn't say.
pub(crate) fn host_memory() -> u64 {
    said(Command::new("/usr/sbin/sysctl").args(["-n", "hw.memsize"]))
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// Another process, by its number and when it started: another of its number is not taken for it,
/// but for the moment between the look and the deed.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    number: Pid,
    started: u64,
}

impl Process {
    /// The process with this number, if there is one.
    pub(crate) fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        Ok(start_time(pid).map(|started| Self {
            pid,
            number,
            started,
        }))
    }

    /// Waits for its end; answers whether it came in time.
    pub(crate) fn ends_within(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            if test_kill_process(self.number) == Err(Errno::SRCH)
                || start_time(self.pid) != Some(self.started)
            {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Kills it. One that has ended is fine.
    pub(crate) fn kill(&self) -> io::Result<()> {
        if start_time(self.pid) != Some(self.started) {
            return Ok(());
        }
        match kill_process(self.number, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Where this program is as a file that can be executed: not told, as nothing is gained by it.
pub(crate) const PROGRAM: Option<&str> = None;

/// There is no such request.
pub(crate) fn end_with(_: u32) -> io::Result<()> {
    Ok(())
}

/// A number that changes while process `pid` uses processor time.
pub(crate) fn processor_time(pid: u32) -> u64 {
    let time = said(Command::new("/bin/ps").args(["-o", "cputime=", "-p", &pid.to_string()]));
    let digest = Sha256::digest(time.unwrap_or_default());
    digest
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A number for the moment at which process `pid` started; `None` if there is none, or if it has
/// ended and nobody has asked how.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let line = said(Command::new("/bin/ps").args(["-o", "stat=,lstart=", "-p", &pid.to_string()]))?;
    let (state, started) = line.split_once(' ')?;
    if state.starts_with('Z') {
        return None;
    }
    let digest = Sha256::digest(started.trim());
    digest.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// What a program says, if it says something and succeeds.
fn said(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
