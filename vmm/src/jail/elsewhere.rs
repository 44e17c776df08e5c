//! Systems without the walls of Linux: the process gives up what it can, and tells that the layers
//! are missing. It still holds no file but what it is sent, and ends with its parent.

#![allow(
    unsafe_code,
    reason = "closing unknown descriptors is not expressible safely"
)]

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::process::{Child, Command};

use rustix::process::{Resource, Rlimit, setrlimit};

use super::{Filter, JailError, Layer, Missing, Policy, step};

/// Closes every inherited file but the standard streams.
///
/// # Errors
/// The system does not tell which are open.
pub fn close_inherited() -> Result<(), JailError> {
    let failed = |source| JailError::Step(step("close inherited files")(source));
    let open = fs::read_dir("/dev/fd").map_err(failed)?;
    let inherited: Vec<RawFd> = open
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in inherited {
        // SAFETY: the process is at the start of its main function and has one thread; no value of
        // Rust owns such a descriptor. The listing's own is closed already, and refused.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Leaves no core file; tells of each layer that this system has none. That is no lack of a host's,
/// so the policy is not asked.
///
/// # Errors
/// What the kernel refused.
pub fn enter(policy: &Policy, filter: &Filter) -> Result<Vec<Missing>, JailError> {
    enter_beside(policy, filter, false, || ())
}

/// As [`enter`]; calls `begin` first.
///
/// # Errors
/// As [`enter`].
pub fn enter_beside(
    _: &Policy,
    _: &Filter,
    _: bool,
    begin: impl FnOnce(),
) -> Result<Vec<Missing>, JailError> {
    begin();
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)
        .map_err(|errno| JailError::Step(step("forbid core dumps")(errno)))?;
    let missing = |layer| Missing {
        layer,
        reason: format!("{} has none", std::env::consts::OS),
    };
    Ok(Layer::ALL.map(missing).into())
}

/// There are none.
///
/// # Errors
/// Always.
pub fn new_network() -> io::Result<OwnedFd> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Would leave the namespace again.
#[derive(Debug)]
pub struct Inside(Infallible);

/// There are none to enter.
///
/// # Errors
/// Always.
pub fn enter_network(_: OwnedFd) -> io::Result<Inside> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Starts a child.
///
/// # Errors
/// The child can't be started.
pub fn spawn_apart(command: &mut Command) -> io::Result<Child> {
    command.spawn()
}

impl Filter {
    /// Does nothing: there is no seccomp here.
    ///
    /// # Errors
    /// None.
    pub fn install(&self) -> io::Result<()> {
        Ok(())
    }
}

/// There is no filter that could have ended a process.
pub(crate) fn call_name(_: usize) -> &'static str {
    "unknown"
}
