//! What an architecture's machine has beside virtio.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::os::fd::OwnedFd;

#[cfg(target_arch = "aarch64")]
pub(super) use aarch64::{Port, PortState, attach};
#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::{Port, PortState, attach};

/// The serial port to be.
pub(super) struct Serial {
    /// Where the kernel's log goes.
    pub(super) sink: Option<OwnedFd>,
    /// What its registers were in a snapshot.
    pub(super) state: Option<PortState>,
}
