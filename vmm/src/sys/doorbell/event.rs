//! A doorbell that is one eventfd (eventfd(2)), so that KVM can ring it itself (ioeventfd).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One notification with memory: rung any number of times before it is cleared, it counts once.
#[derive(Debug)]
pub struct Doorbell(EventFd);

impl Doorbell {
    /// Makes a doorbell that is not ringing.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Rings; the read side becomes readable and stays so until [`Doorbell::clear`].
    pub fn ring(&self) -> io::Result<()> {
        match self.0.write(1) {
            // No room for one more notification: it is ringing already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Silences the doorbell and tells whether it was ringing. Never blocks.
    pub fn clear(&self) -> io::Result<bool> {
        match self.0.read() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What KVM is to ring.
    pub(crate) fn event(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Doorbell {
    /// The side that becomes readable, and also the one to write to.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd owns its descriptor, and the borrow can't outlive `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
