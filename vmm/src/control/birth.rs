//! The birth of a VMM process.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::client::ControlError;
use super::spec::SpawnConfig;
use super::{ARG0, ARG1};

/// Starts the process with `socket` as its standard input, in a pid namespace of its own where the
/// kernel allows. Where it doesn't, the child finds out, and its policy says what follows.
pub(super) fn spawn(config: &SpawnConfig, socket: UnixStream) -> Result<Child, ControlError> {
    let failed = |source| ControlError::Spawn {
        exe: config.exe.clone(),
        source,
    };
    let policy = serde_json::to_string(&config.jail).map_err(|error| failed(error.into()))?;
    let mut command = Command::new(&config.exe);
    command
        .arg0(ARG0)
        .args([ARG1, &config.name, config.log_level.as_str(), &policy])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    spawn_apart(&mut command).map_err(failed)
}

#[cfg(target_os = "linux")]
fn spawn_apart(command: &mut Command) -> io::Result<Child> {
    use nix::sched::{CloneFlags, setns, unshare};

    let home = File::open("/proc/self/ns/pid")?;
    // A thread's own affair: the other threads' children stay where they are.
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWPID) {
        tracing::debug!(%errno, "no pid namespace for the VMM process");
        return command.spawn();
    }
    let child = command.spawn();
    // Until then the thread could start no other thread (clone(2), EINVAL).
    if let Err(errno) = setns(home, CloneFlags::CLONE_NEWPID) {
        tracing::warn!(%errno, "children of this thread stay in the VMM process's pid namespace");
    }
    child
}

#[cfg(not(target_os = "linux"))]
fn spawn_apart(command: &mut Command) -> io::Result<Child> {
    command.spawn()
}
