//! What the two processes say to each other.
//!
//! The parent sends [`Request`]s; the child answers each with a [`ToParent::Reply`] and tells of
//! itself with [`Event`]s. Files travel beside their frame and are named by their place there.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::devices::virtio::balloon::BalloonConfig;
use crate::jail::{Missing, Policy};

/// Version of these messages. Parent and child are built together, so a mismatch means that something
/// else was executed, such as a program that was installed meanwhile.
pub const VERSION: u32 = 1;

/// What the child does before it listens: told as it is executed.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Beginning {
    /// How it confines itself.
    pub(crate) jail: Policy,
    /// It was born in a network namespace of its own.
    pub(crate) own_network: bool,
    /// How many disks to be ready for.
    pub(crate) disks: usize,
}

/// Place of a file among those attached to a frame.
pub(super) type FileIndex = usize;

/// Parent to child.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    /// Chosen by the parent; the reply carries it again.
    pub(super) id: u64,
    pub(super) body: Body,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(super) enum Body {
    Boot(Box<Boot>),
    AttachPort {
        port: u32,
        input: Option<FileIndex>,
        output: Option<FileIndex>,
    },
    DetachPort {
        port: u32,
    },
    CloseInput {
        port: u32,
    },
    ResizePort {
        port: u32,
        columns: u16,
        rows: u16,
    },
    SetBalloon {
        bytes: u64,
    },
    /// Answered once the balloon has its target, or after that time.
    AwaitBalloon {
        milliseconds: u64,
    },
    BalloonStats,
    /// Of a disk that is empty.
    FillDisk {
        disk: usize,
        files: Vec<FileIndex>,
    },
    Pause,
    Resume,
    /// Of a VM that is paused; answered when it is written.
    Snapshot {
        file: FileIndex,
        base: Vec<FileIndex>,
    },
    /// Instead of `Boot`.
    Restore(Box<Restore>),
    Stop,
}

/// A whole VM. The fields are those of [`BootSpec`](super::BootSpec).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Boot {
    pub(super) vcpus: u32,
    pub(super) memory: u64,
    pub(super) kernel: FileIndex,
    pub(super) initramfs: Option<FileIndex>,
    pub(super) cmdline: String,
    pub(super) serial: Option<FileIndex>,
    pub(super) disks: Vec<Disk>,
    pub(super) console: Option<Console>,
    pub(super) vsock: Option<Vsock>,
    pub(super) balloon: Option<BalloonConfig>,
    pub(super) rng: bool,
}

/// A VM that goes on. The fields are those of [`RestoreSpec`](super::RestoreSpec).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Restore {
    pub(super) snapshot: Vec<FileIndex>,
    pub(super) verify_memory: bool,
    pub(super) serial: Option<FileIndex>,
    pub(super) disks: Vec<Disk>,
    pub(super) ports: Vec<Port>,
    pub(super) vsock: Option<Vsock>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Port {
    pub(super) port: u32,
    pub(super) input: Option<FileIndex>,
    pub(super) output: Option<FileIndex>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Disk {
    pub(super) files: Vec<FileIndex>,
    pub(super) read_only: bool,
    pub(super) serial: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Console {
    pub(super) ports: Vec<String>,
    pub(super) max_ports: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Vsock {
    pub(super) cid: u32,
    pub(super) listener: FileIndex,
}

/// Child to parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(super) enum ToParent {
    /// The first message: the child is confined and waits for requests.
    Hello {
        version: u32,
        /// Layers of its confinement that the host lacks.
        #[serde(default)]
        missing: Vec<Missing>,
    },
    Reply {
        id: u64,
        result: Result<Answer, ErrorMessage>,
    },
    Event(Event),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(super) enum Answer {
    Done,
    BalloonStats(BalloonStats),
}

/// What the guest's balloon driver reports; what it left out is absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStats {
    /// Bytes asked of the balloon.
    pub target: u64,
    /// Bytes the balloon holds.
    pub actual: u64,
    /// Bytes of memory the guest has free.
    pub free: Option<u64>,
    /// Bytes of memory the guest sees.
    pub total: Option<u64>,
    /// Bytes the guest could use without swapping.
    pub available: Option<u64>,
    /// Bytes of reclaimable page cache.
    pub disk_caches: Option<u64>,
    /// Major page faults since boot.
    pub major_faults: Option<u64>,
    /// Minor page faults since boot.
    pub minor_faults: Option<u64>,
    /// Bytes that the guest has reported as free since boot.
    #[serde(default)]
    pub reported: u64,
    /// Bytes that went back to the host since boot, reported or in the balloon.
    #[serde(default)]
    pub discarded: u64,
    /// Pages the guest named that could not be: no RAM, twice in, or not in the balloon.
    #[serde(default)]
    pub refused_pages: u64,
}

/// Why a request failed, as far as a caller acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request names something that can't be: a bad kernel, a port that isn't there.
    Invalid,
    /// The hypervisor is absent, forbidden or lacks something.
    Hypervisor,
    /// The host refused a resource: memory, a thread, a descriptor.
    Resource,
    /// The request doesn't fit the VM's state: booted twice, no such device.
    State,
    /// Anything else.
    Internal,
}

/// A failed request, as the child words it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorMessage {
    /// What a caller decides by.
    pub kind: ErrorKind,
    /// What a person reads: the error with its causes.
    pub text: String,
}

impl fmt::Display for ErrorMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for ErrorMessage {}

/// What happens in the VM without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Event {
    /// The guest opened its side of a console port.
    PortOpened {
        /// The port.
        port: u32,
    },
    /// The guest closed its side, and what it wrote has reached the port's output.
    PortClosed {
        /// The port.
        port: u32,
    },
    /// The end of the port's input has been delivered to the guest.
    InputEnded {
        /// The port.
        port: u32,
    },
    /// A guest broke a device's rules and the device stopped; the VM goes on.
    DeviceFault {
        /// The device's id, as in the logs.
        device: String,
        /// What it met.
        reason: String,
    },
    /// A line of the child's log.
    Log {
        /// How serious it is.
        level: LogLevel,
        /// The module it comes from.
        target: String,
        /// The line; no control characters.
        text: String,
    },
    /// The VM is gone and so is its process. The last event, and there is exactly one.
    Ended(Exit),
}

/// How serious a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is odd, and handled.
    Warn,
    /// What happened.
    Info,
    /// How it happened.
    Debug,
    /// Every step.
    Trace,
}

impl LogLevel {
    /// The name, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        [
            Self::Error,
            Self::Warn,
            Self::Info,
            Self::Debug,
            Self::Trace,
        ]
        .into_iter()
        .find(|level| level.as_str() == name)
    }
}

/// How a VM ended, as its parent sees it: what [`crate::Exit`] says, or that nothing was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Exit {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's processor gave up.
    TripleFault,
    /// [`VmHandle::stop`](super::VmHandle::stop) ended it.
    Stopped,
    /// The VMM failed or broke the rules of the control socket.
    Fault(String),
    /// A signal ended the process.
    Killed {
        /// The signal's number.
        signal: i32,
    },
    /// The process left without a word.
    Vanished {
        /// Its exit status.
        status: i32,
    },
}

impl From<crate::Exit> for Exit {
    fn from(exit: crate::Exit) -> Self {
        match exit {
            crate::Exit::PowerOff => Self::PowerOff,
            crate::Exit::Reset => Self::Reset,
            crate::Exit::TripleFault => Self::TripleFault,
            crate::Exit::Stopped => Self::Stopped,
            crate::Exit::Fault(reason) => Self::Fault(reason),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("powered off"),
            Self::Reset => f.write_str("reset"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Stopped => f.write_str("stopped"),
            Self::Fault(reason) => write!(f, "VMM fault: {reason}"),
            Self::Killed { signal } => write!(f, "killed by signal {signal}"),
            Self::Vanished { status } => write!(f, "left with status {status} and no reason"),
        }
    }
}
