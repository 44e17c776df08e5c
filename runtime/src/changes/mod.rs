//! What a container wrote, put into its snapshot.
//!
//! The agent tells it as a stream ([`supermachine_protocol::changes`]), which a process of its own
//! reads, this program executed again: it has the connection to the guest and two open directories,
//! and nothing else of the host ([`child`]). It works in two steps:
//!
//! 1. [`receive`] checks the whole stream and makes every inode of it in a staging directory beside
//!    the snapshot's. A stream that is refused, cut or too large leaves the snapshot as it was.
//! 2. [`apply`] renames those inodes into place, makes directories, and removes what is gone. It
//!    needs neither the guest nor the shim, and no space for data.
//!
//! [`write_back`] is the other side: it starts the process and waits for what it says.

#[cfg(target_os = "linux")]
mod apply;
#[cfg(target_os = "linux")]
mod child;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
mod place;
#[cfg(target_os = "linux")]
mod receive;
#[cfg(target_os = "linux")]
mod tree;
#[cfg(target_os = "linux")]
mod writer;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use supermachine_vmm::jail::Policy;

#[cfg(target_os = "linux")]
pub use child::{confine, main as child};
#[cfg(not(target_os = "linux"))]
pub use elsewhere::{Started, child, start};
pub use place::Place;
#[cfg(target_os = "linux")]
pub use writer::{Started, start};

/// What the process is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The directory is the upper one of an overlay, in which deletions are marked; otherwise it is
    /// all there is.
    pub overlay: bool,
    /// The most names.
    pub entries: u64,
    /// The most bytes.
    pub bytes: u64,
    /// How long the guest may take in all.
    pub time: Duration,
    /// How long it may say nothing.
    pub silence: Duration,
    /// How strictly the process is confined.
    pub jail: Policy,
}

/// What became of the changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// They are in the snapshot.
    Written {
        /// Names that were told.
        entries: u64,
        /// Bytes of data.
        bytes: u64,
    },
    /// They are lost, and the snapshot is as it was.
    Refused {
        /// Why.
        reason: String,
    },
    /// The snapshot has some of them.
    Partial {
        /// Why not all.
        reason: String,
    },
}
