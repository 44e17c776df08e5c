//! The VMM process: a program's second life.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use crate::control::{self, ARG0, ARG1, LogLevel, Start};
use crate::hypervisor::{Host, Hypervisor};
use crate::jail::{self, Policy};

/// Runs a VMM if this process was executed to be one, and returns its exit status; returns nothing
/// in every other process.
///
/// A program that uses [`VmHandle::spawn`](control::VmHandle::spawn) calls this first in its
/// `main`, before any thread exists and any file is open: a VMM process gives up its privileges
/// and closes what it inherited.
///
/// ```no_run
/// fn main() -> std::process::ExitCode {
///     if let Some(code) = supermachine_vmm::child::main() {
///         return code;
///     }
///     // The program.
///     std::process::ExitCode::SUCCESS
/// }
/// ```
pub fn main() -> Option<ExitCode> {
    let mut args = env::args_os();
    let is = |arg: Option<OsString>, expected: &str| arg.is_some_and(|arg| arg == expected);
    if !is(args.next(), ARG0) || !is(args.next(), ARG1) {
        return None;
    }
    let level = args
        .nth(1)
        .and_then(|level| LogLevel::parse(level.to_str()?))
        .unwrap_or(LogLevel::Warn);
    let policy = args.next();
    Some(run(level, policy.as_deref()))
}

fn run(level: LogLevel, policy: Option<&OsStr>) -> ExitCode {
    let confined = confine(policy);
    let socket = match control_socket() {
        Ok(socket) => socket,
        // There is nobody to tell.
        Err(_) => return ExitCode::FAILURE,
    };
    match confined {
        Ok(start) => control::serve(socket, level, start),
        Err(error) => control::give_up(&socket, &*error),
    }
}

/// What a VMM needs and will not get at once it is confined, is opened before.
fn confine(policy: Option<&OsStr>) -> Result<Start, Box<dyn std::error::Error>> {
    let policy = match policy {
        Some(policy) => serde_json::from_slice(policy.as_bytes())?,
        None => Policy::default(),
    };
    jail::close_inherited()?;
    let hypervisor = Host::open();
    let missing = jail::enter(&policy)?;
    Ok(Start {
        hypervisor,
        missing,
    })
}

/// The control socket is standard input. It moves away from there, so that nothing reads it by
/// mistake; the descriptor 0 that stays holds the socket open no longer than the process lives.
fn control_socket() -> io::Result<UnixStream> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Refuses what is no socket.
    socket.peer_addr()?;
    Ok(socket)
}
