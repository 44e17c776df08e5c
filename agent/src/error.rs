//! What can go wrong in a call, and the code under which the host learns of it.

use std::io;
use std::path::PathBuf;

use supermachine_protocol::ttrpc;

/// An error of one of the agent's calls.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request contradicts itself or cannot be parsed.
    #[error("{what}: {reason}")]
    Invalid {
        /// The part of the request.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such container, process, disk or port.
    #[error("{kind} {name:?} does not exist")]
    NotFound {
        /// What kind of thing.
        kind: &'static str,
        /// Which one.
        name: String,
    },
    /// The name is taken.
    #[error("{kind} {name:?} exists already")]
    Exists {
        /// What kind of thing.
        kind: &'static str,
        /// Which one.
        name: String,
    },
    /// The process has already exited.
    #[error("Process already finished")]
    Finished,
    /// The thing is not in the state that the call needs.
    #[error("{0}")]
    State(String),
    /// A program could not be made to run; the text is worded as runc words it.
    #[error("{0}")]
    Program(String),
    /// The container engine failed.
    #[error("Cannot {action}: {reason}")]
    Engine {
        /// What it was asked to do.
        action: &'static str,
        /// Its own account.
        reason: String,
    },
    /// A file operation failed.
    #[error("Cannot {action} {path}: {source}", path = path.display())]
    File {
        /// Which operation.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another system call failed.
    #[error("Cannot {action}: {source}")]
    System {
        /// What it was for.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            what,
            reason: reason.into(),
        }
    }

    pub(crate) fn not_found(kind: &'static str, name: impl Into<String>) -> Self {
        Self::NotFound {
            kind,
            name: name.into(),
        }
    }

    /// For `map_err`: a failed operation on a file.
    pub(crate) fn file<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source: source.into(),
        }
    }

    /// For `map_err`: a failed system call.
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }

    fn code(&self) -> ttrpc::Code {
        match self {
            Self::Invalid { .. } => ttrpc::Code::INVALID_ARGUMENT,
            Self::NotFound { .. } | Self::Finished => ttrpc::Code::NOT_FOUND,
            Self::Exists { .. } => ttrpc::Code::ALREADY_EXISTS,
            Self::State(_) => ttrpc::Code::FAILED_PRECONDITION,
            Self::Program(_) => ttrpc::Code::UNKNOWN,
            Self::Engine { .. } | Self::File { .. } | Self::System { .. } => ttrpc::Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
