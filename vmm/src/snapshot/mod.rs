//! Snapshots: a VM that stands still, as a file that any number of VMs can go on from.
//!
//! One file has everything but the disks: a head with magic, version and a table of sections; guest
//! RAM at a page boundary, with holes for pages of zeroes, so that it can be mapped as it is; and the
//! sections. Every byte is under a checksum. [`format`](self) is pure and reads what anybody may have
//! written: nothing in a file is believed before it was compared with a limit. A *diff* has only the
//! pages that differ from those of its base, which it names by the base's id.

#[cfg(any(test, feature = "testing"))]
mod anything;
mod describe;
mod error;
mod format;
pub(crate) mod image;
mod source;
pub(crate) mod state;
mod target;
#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "testing"))]
pub use anything::parse_anything;
pub use describe::Description;
pub use error::SnapshotError;
pub use format::{Id, Kind, VERSION};
pub use source::SnapshotFile;
pub use state::StateCodeError;
pub use target::SnapshotTarget;
