//! A doorbell that is a pipe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// One notification with memory: rung any number of times before it is cleared, it counts once.
#[derive(Debug)]
pub struct Doorbell {
    consumer: EventConsumer,
    notifier: EventNotifier,
}

impl Doorbell {
    /// Makes a doorbell that is not ringing.
    pub fn new() -> io::Result<Self> {
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self { consumer, notifier })
    }

    /// Rings; the read side becomes readable and stays so until [`Doorbell::clear`].
    pub fn ring(&self) -> io::Result<()> {
        match self.notifier.notify() {
            // No room for one more notification: it is ringing already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Silences the doorbell and tells whether it was ringing. Never blocks.
    pub fn clear(&self) -> io::Result<bool> {
        let mut ringing = false;
        // The pipe holds one item for each ring.
        loop {
            match self.consumer.consume() {
                Ok(()) => ringing = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ringing),
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Doorbell {
    /// The side that becomes readable.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the consumer owns its descriptor, and the borrow can't outlive `self`.
        unsafe { BorrowedFd::borrow_raw(self.consumer.as_raw_fd()) }
    }
}
