//! The one place where children are waited for.
//!
//! The agent is PID 1: it is handed every orphan of the guest. Those it knows are reported to
//! whoever watches them; the rest only disappear from the process table.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::libc;
use nix::unistd::Pid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys;

/// How a process ended, as a shell sees it: its exit code, or 128 + the signal's number.
pub(crate) type ExitStatus = u32;

/// Waits for children.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    watched: Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>,
}

impl Reaper {
    /// Starts to reap, on the current runtime, for as long as that lives.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        let children = signal(SignalKind::child())?;
        let reaper = Arc::new(Self::default());
        tokio::spawn(Arc::clone(&reaper).run(children));
        Ok(reaper)
    }

    /// Spawns a child; it cannot be reaped before it is watched.
    pub(crate) fn spawn(
        &self,
        command: &mut Command,
    ) -> io::Result<(Pid, oneshot::Receiver<ExitStatus>)> {
        let mut watched = self.watched();
        let child = command.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let (exited, exit) = oneshot::channel();
        watched.insert(pid, exited);
        Ok((pid, exit))
    }

    /// Reports the exit of a process that is not, or not yet, this process's child.
    ///
    /// The caller makes sure that it becomes one only afterwards.
    pub(crate) fn watch(&self, pid: Pid) -> oneshot::Receiver<ExitStatus> {
        let (exited, exit) = oneshot::channel();
        self.watched().insert(pid, exited);
        exit
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<Pid, oneshot::Sender<ExitStatus>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>, mut children: Signal) {
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    fn reap(&self) {
        let mut watched = self.watched();
        loop {
            let (pid, status) = match sys::reap_any() {
                Ok(Some(reaped)) => reaped,
                Ok(None) => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ECHILD) => return,
                    Some(libc::EINTR) => continue,
                    _ => {
                        tracing::error!(%error, "cannot wait for children");
                        return;
                    }
                },
            };
            tracing::debug!(pid = pid.as_raw(), status, "reaped");
            if let Some(exited) = watched.remove(&pid) {
                // The watcher may have lost interest.
                let _ = exited.send(status);
            }
        }
    }
}
