//! What a sandbox tells the world, in the order in which it happened.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::request::{Mount, Stdio};

/// A step in a task's life.
///
/// For one task the order is `Created`, `Started`, `Exited`, `Deleted`; for an exec'd process
/// `ExecAdded`, `ExecStarted`, `Exited`. Steps that did not happen are left out. Between `Started`
/// and `Exited`, `Paused` and `Resumed` come by turns; an exit may follow `Paused` directly.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The container exists, its program does not run yet.
    Created {
        /// The container.
        container_id: String,
        /// Its OCI bundle.
        bundle: PathBuf,
        /// The mounts its root file system was asked to be made of.
        rootfs: Vec<Mount>,
        /// Its streams, as asked for.
        stdio: Stdio,
        /// The process that stands for it on the host.
        pid: u32,
    },
    /// The container's program runs.
    Started {
        /// The container.
        container_id: String,
        /// The process that stands for it on the host.
        pid: u32,
    },
    /// A further process was described; it does not run yet.
    ExecAdded {
        /// The container.
        container_id: String,
        /// The process within it.
        exec_id: String,
    },
    /// A further process runs.
    ExecStarted {
        /// The container.
        container_id: String,
        /// The process within it.
        exec_id: String,
        /// The process that stands for it on the host.
        pid: u32,
    },
    /// The machine's processors have stopped.
    Paused {
        /// The container.
        container_id: String,
    },
    /// They go on.
    Resumed {
        /// The container.
        container_id: String,
    },
    /// A process ended and everything it wrote has been delivered.
    Exited {
        /// The container.
        container_id: String,
        /// Empty: the container's init process.
        exec_id: String,
        /// The process that stood for it on the host.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// The container is gone, and what it used with it.
    Deleted {
        /// The container.
        container_id: String,
        /// The process that stood for it on the host.
        pid: u32,
        /// How its init process ended.
        exit: Exit,
    },
    /// The guest's kernel killed a process of the container for want of memory.
    OutOfMemory {
        /// The container.
        container_id: String,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + the number of the signal that ended it; 255 when nobody knows.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}
