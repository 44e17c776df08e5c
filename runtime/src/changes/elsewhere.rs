//! Systems other than Linux: no snapshot has a directory there that changes could be put into.

use std::io;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use super::{Job, Outcome, Place};

/// No program is executed for it.
pub fn child() -> Option<ExitCode> {
    None
}

/// Never there.
#[derive(Debug)]
pub enum Started {}

/// Refuses.
///
/// # Errors
/// Always.
pub fn start(_: &Job, _: &Place, _: &UnixStream) -> io::Result<Started> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Started {
    /// None.
    pub fn pid(&self) -> u32 {
        match *self {}
    }

    /// None.
    #[allow(clippy::unused_async, reason = "as where there is one")]
    pub async fn outcome(self) -> Outcome {
        match self {}
    }
}
