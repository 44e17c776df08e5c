//! Confinement of the VMM child: what the process gives up before it reads its first request.
//!
//! Everything the child works with comes to it as open files over the control socket, so it can
//! renounce what would get it more: inherited files, privileges, core dumps.

#[cfg(target_os = "linux")]
mod linux;

use std::io;

#[cfg(target_os = "linux")]
pub(crate) use linux::enter;

/// A step of the confinement that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("Confine the VMM process: {step}")]
pub(crate) struct JailError {
    step: &'static str,
    #[source]
    source: io::Error,
}
