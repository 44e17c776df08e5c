//! Events on their way to the host.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use supermachine_protocol::{Event, Exit, Oom};
use tokio::sync::Notify;

/// A queue with one reader: the newest stream.
#[derive(Debug, Default)]
pub(crate) struct Events {
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    stream: u64,
}

impl Events {
    pub(crate) fn exit(
        &self,
        container_id: &str,
        exec_id: &str,
        status: u32,
        exited_at_ns: i64,
        changes: bool,
    ) {
        let mut exit = Exit::new();
        exit.container_id = container_id.to_owned();
        exit.exec_id = exec_id.to_owned();
        exit.status = status;
        exit.exited_at_ns = exited_at_ns;
        exit.changes = changes;
        let mut event = Event::new();
        event.set_exit(exit);
        self.push(event);
    }

    pub(crate) fn oom(&self, container_id: &str) {
        let mut oom = Oom::new();
        oom.container_id = container_id.to_owned();
        let mut event = Event::new();
        event.set_oom(oom);
        self.push(event);
    }

    fn push(&self, event: Event) {
        self.queue().events.push_back(event);
        self.changed.notify_waiters();
    }

    /// Makes a new stream the reader; the one before ends. Returns the new one's number.
    pub(crate) fn open_stream(&self) -> u64 {
        let mut queue = self.queue();
        queue.stream += 1;
        self.changed.notify_waiters();
        queue.stream
    }

    /// The next event for `stream`, or `None` once another stream has taken over.
    pub(crate) async fn next(&self, stream: u64) -> Option<Event> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on a change is noticed, so none is missed between the look and the wait.
            changed.as_mut().enable();
            {
                let mut queue = self.queue();
                if queue.stream != stream {
                    return None;
                }
                if let Some(event) = queue.events.pop_front() {
                    return Some(event);
                }
            }
            changed.await;
        }
    }

    /// Puts an event back that could not be sent; the next stream sends it first.
    pub(crate) fn put_back(&self, event: Event) {
        self.queue().events.push_front(event);
        self.changed.notify_waiters();
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
