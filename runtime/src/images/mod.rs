//! File-system images made from directories of the host.
//!
//! A layer of an image never changes, so its EROFS image is made once and kept: [`Cache`]. What a
//! container writes goes to a sparse ext4 of its own: [`Cache::writable`]. Making either takes
//! `mkfs.erofs` (erofs-utils 1.5 or later) and `mkfs.ext4` (e2fsprogs 1.43 or later).

mod cache;
mod erofs;
mod ext4;
mod identity;
mod mounted;
mod own;
mod progress;
mod sweep;
mod tool;

use std::io;
use std::path::PathBuf;

pub use cache::Cache;
pub(crate) use cache::nameless;
pub(crate) use identity::Identity;
pub(crate) use mounted::mounted;
pub(crate) use own::{disk as own_disk, image as own_image, size};
pub(crate) use sweep::sweep;
pub(crate) use tool::{MKFS_EROFS, MKFS_EXT4, Tool, child};

/// Why an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer, or the root directory, that the snapshotter named isn't there.
    #[error("The root's directory {} cannot be read", path.display())]
    Source { path: PathBuf, source: io::Error },
    /// It was written to while its image was made.
    #[error("The layer {} changed while it was read", path.display())]
    Changed { path: PathBuf },
    #[error("Cannot use {} for images", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("Cannot run {program}; install the package {package}")]
    Missing {
        program: &'static str,
        package: &'static str,
        source: io::Error,
    },
    #[error("{program} failed on {}: {reason}", path.display())]
    Mkfs {
        program: &'static str,
        path: PathBuf,
        reason: String,
    },
    #[error("Cannot mount {count} layers as one")]
    Merge { count: usize, source: io::Error },
    /// The disk, or a layer, that the snapshotter has made.
    #[error("Cannot use the snapshot's disk {}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error("The snapshot's disk {} is in use by another container", path.display())]
    InUse { path: PathBuf },
}

#[cfg(test)]
mod tests;
