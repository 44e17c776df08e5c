//! Why a sandbox refused or failed, and which kind of refusal that is.

use std::time::Duration;

use crate::ledger;

/// The kinds of failure a caller can tell apart; containerd's own, by their gRPC names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such container or process, or it has finished.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Not in the state the call needs.
    FailedPrecondition,
    /// The request can never succeed as it is.
    InvalidArgument,
    /// The guest did not answer in time.
    DeadlineExceeded,
    /// The guest cannot be asked just now.
    Unavailable,
    /// All of something is in use.
    ResourceExhausted,
    /// Not offered.
    Unimplemented,
    /// A program can't be run as its configuration has it. For containerd that has no name.
    Program,
    /// All else.
    Internal,
}

/// Why a call failed. The wording of refusals is what users of runc's shim know.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A refusal with nothing to add to its text.
    #[error("{text}")]
    Refused {
        /// Which kind.
        kind: Kind,
        /// Why.
        text: String,
    },
    /// The request itself is wrong.
    #[error(transparent)]
    Request(#[from] crate::request::Error),
    /// The request cannot be turned into a machine.
    #[error(transparent)]
    Plan(#[from] crate::plan::Error),
    /// Something the plan needs could not be had.
    #[error(transparent)]
    Acquire(#[from] crate::acquire::Error),
    /// What is acquired cannot be written down, or not be undone.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// The request cannot be told to the guest.
    #[error("Cannot encode an OCI object for the guest")]
    Encode {
        /// Why not.
        source: serde_json::Error,
    },
    /// Guests' kernels would be interpreted.
    #[error(
        "The host's /dev/kvm only emulates: {reason}; expected hardware virtualization \
         ([vm] allow_emulated_kvm = true starts machines all the same, each takes minutes)"
    )]
    EmulatedKvm {
        /// How that is known.
        reason: &'static str,
    },
    /// A program of the host's failed that the container's start depends on.
    #[error("OCI runtime {during} failed: unable to start container process")]
    Hook {
        /// What was being done.
        during: &'static str,
        /// Which one, and why.
        source: crate::hooks::Error,
    },
    /// A stream could not be opened.
    #[error(transparent)]
    Stdio(#[from] crate::acquire::stdio::Error),
    /// All console ports are in use.
    #[error(
        "All {total} console ports are in use; a process takes one for each of its streams \
         (raise [console] ports)"
    )]
    NoFreePort {
        /// How many there are.
        total: u32,
    },
    /// The machine monitor could not be started or did not do as told.
    #[error("The virtual machine failed: {what}")]
    Machine {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The guest gave no numbers.
    #[error("No statistics of container {id}")]
    NoStats {
        /// Which one.
        id: String,
        /// Why not.
        source: Box<Error>,
    },
    /// The machine ended while something was being done.
    #[error("The virtual machine ended {during}: {reason}")]
    MachineEnded {
        /// What was being done.
        during: &'static str,
        /// Why it ended.
        reason: String,
    },
    /// The guest did not get as far as it should have in time.
    #[error("The guest did not answer within {} s; {last}", .limit.as_secs_f32())]
    Silent {
        /// How long was waited.
        limit: Duration,
        /// The last that was heard of it.
        last: String,
    },
    /// The connection to the agent broke.
    #[error("Lost the connection to the guest's agent while {during}: {text}")]
    Connection {
        /// What was being done.
        during: &'static str,
        /// What the transport said.
        text: String,
    },
    /// The agent refused or failed.
    #[error("{text}")]
    Guest {
        /// Which kind.
        kind: Kind,
        /// The agent's own words.
        text: String,
    },
}

impl Error {
    /// A call that the state of things does not allow.
    pub(super) fn state(text: impl Into<String>) -> Self {
        Self::refused(Kind::FailedPrecondition, text)
    }

    /// A thing that is not there.
    pub(super) fn not_found(text: impl Into<String>) -> Self {
        Self::refused(Kind::NotFound, text)
    }

    pub(super) fn refused(kind: Kind, text: impl Into<String>) -> Self {
        Self::Refused {
            kind,
            text: text.into(),
        }
    }

    /// Which kind of failure this is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Refused { kind, .. } | Self::Guest { kind, .. } => *kind,
            Self::Ledger(ledger::Error::Exists { .. } | ledger::Error::InUse { .. }) => {
                Kind::AlreadyExists
            }
            Self::Request(_) | Self::Plan(_) | Self::Encode { .. } => Kind::InvalidArgument,
            Self::EmulatedKvm { .. } => Kind::FailedPrecondition,
            Self::Hook { .. } => Kind::Program,
            Self::NoStats { .. } => Kind::Unavailable,
            Self::NoFreePort { .. } => Kind::ResourceExhausted,
            Self::Silent { .. } => Kind::DeadlineExceeded,
            Self::Acquire(_)
            | Self::Ledger(_)
            | Self::Stdio(_)
            | Self::Machine { .. }
            | Self::MachineEnded { .. }
            | Self::Connection { .. } => Kind::Internal,
        }
    }

    /// The whole chain in one line, as containerd's users will see it.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}
