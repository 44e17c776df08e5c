//! Why a snapshot was not written, or not accepted.

use std::io;
use std::path::PathBuf;

use super::StateCodeError;
use super::format::{Id, Kind};
use crate::memory::MemoryError;

/// Why a snapshot was not written, or not accepted. Nothing of a VM runs after one of these.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file itself.
    #[error("Cannot {what} the snapshot")]
    File {
        /// What was tried.
        what: &'static str,
        /// What the system call answered.
        source: io::Error,
    },
    /// A path of the directory it goes to.
    #[error("Cannot {what} {path}")]
    Path {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system call answered.
        source: io::Error,
    },
    /// It begins like no snapshot.
    #[error("This is no snapshot: it begins with {found:02x?}")]
    Magic {
        /// Its first bytes.
        found: [u8; 8],
    },
    /// It was written by another version of this program.
    #[error("Snapshot has format version {found}, expected {}", super::VERSION)]
    Version {
        /// Its version.
        found: u32,
    },
    /// It is shorter or longer than it says.
    #[error("Snapshot has {found} bytes, expected {expected}")]
    Length {
        /// The file's.
        found: u64,
        /// What its head says.
        expected: u64,
    },
    /// Bytes are not those that were written.
    #[error(
        "Snapshot is damaged: the checksum of its {part} is {found:08x}, expected {expected:08x}"
    )]
    Checksum {
        /// Which.
        part: String,
        /// Of what is there.
        found: u32,
        /// Of what was written.
        expected: u32,
    },
    /// Its parts contradict each other, or the limits of the format.
    #[error("Snapshot is not sound: {0}")]
    Unsound(String),
    /// A section it can't do without.
    #[error("Snapshot has no section {kind:?} {index}")]
    Missing {
        /// Of this kind.
        kind: Kind,
        /// With this number.
        index: u32,
    },
    /// A section that is no state.
    #[error("Section {kind:?} {index} of the snapshot is not what it should be")]
    Section {
        /// Of this kind.
        kind: Kind,
        /// With this number.
        index: u32,
        /// What the parser met.
        source: StateCodeError,
    },
    /// A diff was given with another base than it was made on.
    #[error("Snapshot was made on base {expected}, given on {found}")]
    Base {
        /// The id of what was given below it; none for nothing.
        found: String,
        /// The id it names; none for a full snapshot.
        expected: String,
    },
    /// Guest RAM could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl SnapshotError {
    pub(super) fn file(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { what, source }
    }

    pub(super) fn base(found: Option<Id>, expected: Option<Id>) -> Self {
        let name = |id: Option<Id>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
        Self::Base {
            found: name(found),
            expected: name(expected),
        }
    }
}
