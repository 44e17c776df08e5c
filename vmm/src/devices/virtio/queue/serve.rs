//! The loop around most queues: answer chains until there are none, within a budget.

use std::io;

use super::{Chain, RingFault};
use crate::devices::virtio::{ActiveQueue, Interrupt};

/// Why [`ActiveQueue::serve`] ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The driver broke the queue.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// The queue's doorbell failed.
    #[error("Doorbell of queue {queue} failed")]
    Doorbell {
        /// The queue.
        queue: u16,
        /// What the system call answered.
        source: io::Error,
    },
    /// The host takes no I/O of this device any more.
    #[error("The host refuses I/O")]
    Host(#[source] io::Error),
}

impl ActiveQueue {
    /// Acts on a rung doorbell: has `answer` deal with at most `budget` chains and returns each to
    /// the driver with the number of bytes written that `answer` says. What is over the budget
    /// rings the doorbell again, so that other queues and devices have their turn.
    ///
    /// # Errors
    /// The device can't go on with this queue.
    pub fn serve(
        &mut self,
        interrupt: &Interrupt,
        budget: usize,
        mut answer: impl FnMut(&Chain) -> u32,
    ) -> Result<(), ServeError> {
        let queue = self.index;
        let doorbell = |source| ServeError::Doorbell { queue, source };
        self.doorbell.clear().map_err(doorbell)?;
        let mut left = budget;
        loop {
            self.queue.disable_notification()?;
            while left > 0
                && let Some(chain) = self.queue.pop()?
            {
                left = left.saturating_sub(1);
                let written = answer(&chain);
                self.queue.complete(chain, written)?;
                interrupt.used(&mut self.queue)?;
            }
            if left == 0 {
                return self.doorbell.ring().map_err(doorbell);
            }
            if !self.queue.enable_notification()? {
                return Ok(());
            }
        }
    }
}
