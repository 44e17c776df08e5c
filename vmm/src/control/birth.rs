//! The birth of a VMM process.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::client::ControlError;
use super::spec::SpawnConfig;
use super::{ARG0, ARG1};
use crate::jail;

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
        // It goes to / by itself: asked to do it for a child, the standard library forks, which
        // copies this process's page tables and has it fault on each page it writes to later.
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        // For the last words of a process that can't say them over the socket.
        .stderr(Stdio::piped());
    jail::spawn_apart(&mut command).map_err(failed)
}
