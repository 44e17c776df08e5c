//! The parent's side: a VM in a process of its own, held by a [`VmHandle`].

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::Preparation;
use super::message::{Answer, BalloonStats, Body, ErrorMessage, Event, Exit};
use super::spec::{BootSpec, Files, RestoreSpec, SpawnConfig};
use super::supervisor::{Shared, supervise};
use crate::devices::virtio::console::ATTACH_LIMIT;
use crate::jail::Missing;
use crate::snapshot::{SnapshotError, SnapshotTarget};
use crate::sys::threads;

/// What a request may take that the child answers by itself.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What attaching a port may take: the child gives up on the guest's driver before.
const ATTACH_TIMEOUT: Duration = ATTACH_LIMIT.saturating_add(REQUEST_TIMEOUT);

/// A VM's process did not start, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The thread that watches over the child.
    #[error("Start a thread for VM {name}")]
    Thread {
        /// The VM.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket between the two.
    #[error("Create a control socket")]
    Socket(#[source] io::Error),
    /// The program could not be executed.
    #[error("Execute {} as VMM", exe.display())]
    Spawn {
        /// The program.
        exe: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The program is not a VMM child, or one that failed at its start.
    #[error("{} gave no greeting of a VMM: {found}", exe.display())]
    Greeting {
        /// The program.
        exe: PathBuf,
        /// What came instead.
        found: String,
    },
    /// The file of a snapshot can't be made, or not be given its name.
    #[error(transparent)]
    Snapshot(SnapshotError),
    /// The request itself can't be sent.
    #[error("Request {request}: {found}")]
    Request {
        /// The request.
        request: &'static str,
        /// What is wrong with it.
        found: String,
    },
    /// No answer in time. The request may still happen.
    #[error("No answer to {request} within {after:?}")]
    Timeout {
        /// The request.
        request: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The child says no.
    #[error(transparent)]
    Refused(#[from] ErrorMessage),
    /// There is no VM any more.
    #[error("The VM has ended: {0}")]
    Ended(Exit),
}

/// A VMM process. Dropping it kills and reaps the process.
pub struct VmHandle {
    shared: Arc<Shared>,
}

impl fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmHandle")
            .field("pid", &self.shared.pid)
            .finish_non_exhaustive()
    }
}

impl VmHandle {
    /// Starts the process and waits for its greeting. No VM is made yet.
    ///
    /// Any thread may call this: the process follows a thread of its own that lives as long.
    /// `on_event` is called from that thread, in order; while it blocks, nothing is read from the
    /// child. Once this has returned a handle, [`Event::Ended`] comes exactly once and last, with
    /// the process reaped.
    pub fn spawn(
        config: SpawnConfig,
        on_event: Box<dyn Fn(Event) + Send>,
    ) -> Result<Self, ControlError> {
        Self::spawn_prepared(config, None, on_event)
    }

    /// As [`spawn`](Self::spawn), with what was prepared.
    pub fn spawn_prepared(
        config: SpawnConfig,
        preparation: Option<Preparation>,
        on_event: Box<dyn Fn(Event) + Send>,
    ) -> Result<Self, ControlError> {
        let (started, result) = mpsc::sync_channel(1);
        let name = config.name.clone();
        threads::builder("vmm-control")
            .spawn(move || supervise(&config, preparation, &on_event, &started))
            .map_err(|source| ControlError::Thread {
                name: name.clone(),
                source,
            })?;
        match result.recv() {
            Ok(shared) => Ok(Self { shared: shared? }),
            Err(_) => Err(ControlError::Thread {
                name,
                source: io::Error::other("it ended early"),
            }),
        }
    }

    /// The child's process id. It is the child's until [`Event::Ended`].
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// Layers of the process's confinement that this host lacks and its policy let be missing.
    pub fn missing_layers(&self) -> &[Missing] {
        &self.shared.missing
    }

    /// Makes the VM and starts its processors. Legal once.
    pub fn boot(&self, spec: &BootSpec, timeout: Duration) -> Result<(), ControlError> {
        self.shared.state().max_ports = spec.console.as_ref().map_or(0, |c| c.max_ports);
        let (boot, files) = spec.to_message();
        self.shared
            .done("boot", Body::Boot(Box::new(boot)), &files, timeout)
    }

    /// Makes a VM that goes on from a snapshot, and starts its processors; legal once, instead of
    /// [`boot`](Self::boot). Any number of VMs can go on from the same files.
    pub fn restore(&self, spec: &RestoreSpec, timeout: Duration) -> Result<(), ControlError> {
        self.shared.state().max_ports = spec.max_ports;
        let (restore, files) = spec.to_message();
        self.shared
            .done("restore", Body::Restore(Box::new(restore)), &files, timeout)
    }

    /// Writes a paused VM to `dir`, in place of an older snapshot there; answers where that is. With
    /// `base`, a full snapshot and the diffs on it, it has only what is not the same there. Disks
    /// are not of it.
    ///
    /// # Errors
    /// The VM is not paused, or has ended; the directory can't be written to.
    pub fn snapshot(
        &self,
        dir: &Path,
        base: &[File],
        timeout: Duration,
    ) -> Result<PathBuf, ControlError> {
        let target = SnapshotTarget::create(dir).map_err(ControlError::Snapshot)?;
        let mut files = Files::default();
        let body = Body::Snapshot {
            file: files.add(target.file()),
            base: base.iter().map(|file| files.add(file)).collect(),
        };
        self.shared.done("snapshot", body, &files.0, timeout)?;
        target.commit().map_err(ControlError::Snapshot)
    }

    /// Opens a console port to the guest: `input` is what the guest reads, `output` takes what it
    /// writes. Returns when the guest's driver knows, which it may take seconds to.
    pub fn attach_port(
        &self,
        port: u32,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<(), ControlError> {
        let mut files = Files::default();
        let body = Body::AttachPort {
            port,
            input: input.as_ref().map(|file| files.add(file)),
            output: output.as_ref().map(|file| files.add(file)),
        };
        self.shared
            .done("attach port", body, &files.0, ATTACH_TIMEOUT)
    }

    /// Closes the host's side of a console port.
    pub fn detach_port(&self, port: u32) -> Result<(), ControlError> {
        self.ask("detach port", Body::DetachPort { port })
    }

    /// Ends a port's input: the guest reads what came before, then end of file.
    pub fn close_input(&self, port: u32) -> Result<(), ControlError> {
        self.ask("close input", Body::CloseInput { port })
    }

    /// Tells the guest the size of the terminal behind a port.
    pub fn resize_port(&self, port: u32, columns: u16, rows: u16) -> Result<(), ControlError> {
        self.ask(
            "resize port",
            Body::ResizePort {
                port,
                columns,
                rows,
            },
        )
    }

    /// Stops the VM's processors; returns when they have stopped. See
    /// [`RunningVm::pause`](crate::RunningVm::pause).
    pub fn pause(&self) -> Result<(), ControlError> {
        self.ask("pause", Body::Pause)
    }

    /// Lets the processors of a paused VM go on.
    pub fn resume(&self) -> Result<(), ControlError> {
        self.ask("resume", Body::Resume)
    }

    /// Gives a disk that has been empty what it has from now on; the guest is told. See
    /// [`RunningVm::fill_disk`](crate::RunningVm::fill_disk). The files are open for what the disk's
    /// `read_only` says.
    ///
    /// # Errors
    /// Of [`ErrorKind::Invalid`](super::ErrorKind::Invalid): no such disk, or files that are none.
    /// Of [`ErrorKind::State`](super::ErrorKind::State): a disk that has something.
    pub fn fill_disk(&self, disk: usize, contents: &[File]) -> Result<(), ControlError> {
        let mut files = Files::default();
        let body = Body::FillDisk {
            disk,
            files: contents.iter().map(|file| files.add(file)).collect(),
        };
        self.shared
            .done("fill disk", body, &files.0, REQUEST_TIMEOUT)
    }

    /// Asks the guest for `bytes` of its memory.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        self.ask("set balloon", Body::SetBalloon { bytes })
    }

    /// Waits until the balloon holds what was asked of it. A guest short of memory may never come
    /// to that.
    ///
    /// # Errors
    /// Among others, of [`ErrorKind::State`](super::ErrorKind::State), when it doesn't within
    /// `limit`.
    pub fn await_balloon(&self, limit: Duration) -> Result<(), ControlError> {
        let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let body = Body::AwaitBalloon { milliseconds };
        let wait = limit.saturating_add(REQUEST_TIMEOUT);
        self.shared.done("await balloon", body, &[], wait)
    }

    /// What the balloon holds and the guest last reported.
    pub fn balloon_stats(&self) -> Result<BalloonStats, ControlError> {
        match self
            .shared
            .call("balloon stats", Body::BalloonStats, &[], REQUEST_TIMEOUT)?
        {
            Answer::BalloonStats(stats) => Ok(stats),
            Answer::Done => Err(self.shared.wrong_answer("balloon stats")),
        }
    }

    /// Ends the VM, by force when it takes longer than `timeout`. The process is reaped.
    pub fn stop(&self, timeout: Duration) -> Exit {
        let deadline = Instant::now() + timeout;
        if let Err(error) = self.shared.done("stop", Body::Stop, &[], timeout) {
            tracing::debug!(%error, "the VM did not stop when asked");
        }
        let mut state = self.shared.state();
        while state.exit.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return self.shared.end();
            }
            state = self
                .shared
                .ended
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.exit.clone().unwrap_or(Exit::Stopped)
    }

    /// Kills the process and reaps it.
    pub fn kill(&self) {
        self.shared.reap();
    }

    fn ask(&self, request: &'static str, body: Body) -> Result<(), ControlError> {
        self.shared.done(request, body, &[], REQUEST_TIMEOUT)
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        self.shared.reap();
    }
}
