//! The birth of a VMM process, and its end.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::client::ControlError;
use super::spec::SpawnConfig;
use super::{ARG0, ARG1, Beginning};
use crate::jail;
use crate::sys::birth::{Program, into_cgroup};

/// A VMM process that has been executed. It is reaped by [`kill_and_wait`](Self::kill_and_wait)
/// alone.
#[derive(Debug)]
pub(super) struct Born {
    pub(super) pid: u32,
    /// What it says there are its last words.
    pub(super) stderr: Option<OwnedFd>,
    /// It is in its cgroup, where it has one.
    pub(super) accounted: bool,
}

impl Born {
    pub(super) fn kill_and_wait(&self) -> ExitStatus {
        let pid = self.pid;
        let status = Pid::from_raw(pid.cast_signed()).map_or(Err(Errno::SRCH), |pid| {
            // Refused only if it was reaped, and here alone that happens.
            if let Err(error) = kill_process(pid, Signal::KILL) {
                tracing::error!(pid = self.pid, %error, "kill the VMM process");
            }
            loop {
                match waitpid(Some(pid), WaitOptions::empty()) {
                    Err(Errno::INTR) => {}
                    ended => break ended,
                }
            }
        });
        match status {
            Ok(Some((_, status))) => ExitStatus::from_raw(status.as_raw()),
            // It waits until there is a status.
            Ok(None) => ExitStatus::from_raw(0),
            Err(error) => {
                tracing::error!(pid, %error, "reap the VMM process");
                ExitStatus::from_raw(0)
            }
        }
    }
}

/// Starts the process with `socket` as its standard input, in the network namespace that was made for
/// it and a pid namespace of its own where the kernel allows. Where it doesn't, the child finds out,
/// and its policy says what follows.
pub(super) fn spawn(
    config: &SpawnConfig,
    network: Option<OwnedFd>,
    socket: UnixStream,
) -> Result<Born, ControlError> {
    // The thread is in there until it has the child.
    let inside = network.map(jail::enter_network);
    if let Some(Err(error)) = &inside {
        tracing::debug!(vm = config.name, %error, "no child is born in its network namespace");
    }
    let failed = |source| ControlError::Spawn {
        exe: config.exe.clone(),
        source,
    };
    let beginning = Beginning {
        jail: config.jail.clone(),
        own_network: matches!(inside, Some(Ok(_))),
        disks: config.disks,
    };
    let beginning = serde_json::to_string(&beginning).map_err(|error| failed(error.into()))?;
    let args = [ARG1, &config.name, config.log_level.as_str(), &beginning];
    if let [cgroup] = config.cgroups.as_slice() {
        match in_cgroup(config, cgroup, &args, &socket) {
            Ok(born) => return Ok(born),
            // Cgroup v1, a kernel before 5.7, one that does not allow a pid namespace, or no Linux.
            // If it is the program that can't be executed, that is found again.
            Err(error) => {
                tracing::debug!(vm = config.name, %error, "no child is born in its cgroup");
            }
        }
    }
    let mut command = Command::new(&config.exe);
    command
        .arg0(ARG0)
        .args(args)
        .env_clear()
        // It goes to / by itself: asked to do it for a child, the standard library forks, which
        // copies this process's page tables and has it fault on each page it writes to later.
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        // For the last words of a process that can't say them over the socket.
        .stderr(Stdio::piped());
    let child = jail::spawn_apart(&mut command).map_err(failed)?;
    Ok(Born {
        pid: child.id(),
        stderr: child.stderr.map(OwnedFd::from),
        accounted: config.cgroups.is_empty(),
    })
}

/// The same, born in its cgroup.
fn in_cgroup(
    config: &SpawnConfig,
    cgroup: &Path,
    args: &[&str],
    socket: &UnixStream,
) -> io::Result<Born> {
    let cgroup = File::open(cgroup)?;
    let path = CString::new(config.exe.as_os_str().as_bytes())?;
    let args = std::iter::once(&ARG0)
        .chain(args)
        .map(|arg| CString::new(*arg))
        .collect::<Result<Vec<_>, _>>()?;
    let args: Vec<_> = args.iter().map(CString::as_c_str).collect();
    let output = File::options().write(true).open("/dev/null")?;
    let (errors, stderr) = io::pipe()?;
    let program = Program {
        path: &path,
        args: &args,
        standard: [socket.as_fd(), output.as_fd(), stderr.as_fd()],
    };
    Ok(Born {
        pid: into_cgroup(&cgroup, &program)?,
        stderr: Some(errors.into()),
        accounted: true,
    })
}
