//! A reactor turned by hand, for tests.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::ReactorHandle;
use super::inbox::Inbox;
use super::wheel::Core;

/// A reactor without a thread, which never begins: whoever holds it turns it. Workers become
/// single-stepped, which is what a test wants.
#[derive(Debug)]
pub struct ManualReactor {
    inbox: Arc<Inbox>,
}

impl ManualReactor {
    /// A reactor with no worker.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            inbox: Arc::new(Inbox::new(Core::new()?)),
        })
    }

    /// A handle to spawn workers with; spawning and calls happen at once, on the caller's thread.
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle {
            inbox: Arc::clone(&self.inbox),
        }
    }

    /// Waits up to `limit` for events, dispatches one batch and returns how many there were.
    pub fn turn(&self, limit: Duration) -> io::Result<usize> {
        let turned = self.inbox.with(|core| core.turn(Some(limit)));
        turned.unwrap_or(Ok(0))
    }
}

impl Drop for ManualReactor {
    fn drop(&mut self) {
        self.inbox.close();
    }
}
