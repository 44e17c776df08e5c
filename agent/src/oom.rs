//! Noticing changes of cgroup files, and the out-of-memory kills they tell of.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::events::Events;
use crate::sys;

/// The changes of one file. The kernel raises inotify events for cgroup v2's event files.
#[derive(Debug)]
pub(crate) struct Changes(AsyncFd<Queue>);

/// Gives nix's type what tokio asks of it.
#[derive(Debug)]
struct Queue(Inotify);

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Changes {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
        Ok(Self(sys::readable(Queue(inotify))?))
    }

    /// Waits for the next change since the last call, or since the watch began.
    pub(crate) async fn next(&self) {
        let read = self
            .0
            .async_io(Interest::READABLE, |queue| match queue.0.read_events() {
                Ok(_) => Ok(()),
                Err(Errno::EAGAIN) => Err(io::ErrorKind::WouldBlock.into()),
                Err(error) => Err(error.into()),
            });
        if read.await.is_err() {
            // Nothing will ever be noticed again.
            std::future::pending::<()>().await;
        }
    }
}

/// Reports a container's out-of-memory kills, each increase of their count once.
#[derive(Debug)]
pub(crate) struct Watch {
    container_id: String,
    cgroup: Cgroup,
    seen: std::sync::atomic::AtomicU64,
    /// Nothing without a memory controller: there is nothing to watch.
    task: Option<AbortHandle>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A container that ends without a change of the file would leave the task waiting for one.
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Watch {
    /// Watches for as long as the result is in use.
    pub(crate) fn start(container_id: &str, cgroup: Cgroup, events: Arc<Events>) -> Arc<Self> {
        Arc::new_cyclic(|watch: &Weak<Self>| {
            let changes = Changes::of(&cgroup.memory_events()).ok();
            let task = changes.map(|changes| {
                let watch = Weak::clone(watch);
                let watching = async move {
                    loop {
                        changes.next().await;
                        let Some(watch) = watch.upgrade() else { return };
                        watch.check(&events);
                    }
                };
                tokio::spawn(watching).abort_handle()
            });
            Self {
                container_id: container_id.to_owned(),
                cgroup,
                seen: std::sync::atomic::AtomicU64::new(0),
                task,
            }
        })
    }

    /// Looks now, so that a kill is told before the exit it caused.
    pub(crate) fn check(&self, events: &Events) {
        let kills = self.cgroup.oom_kills();
        if self.seen.swap(kills, std::sync::atomic::Ordering::Relaxed) < kills {
            events.oom(&self.container_id);
        }
    }
}
