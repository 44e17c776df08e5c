//! Obtaining what a plan needs. What would stay when its files are closed is recorded in the ledger
//! first.

mod files;
mod kernel;
pub mod limits;
mod logger;
mod rootfs;
pub mod stdio;

use std::fs::File;
use std::io;
use std::path::PathBuf;

use supermachine_protocol::{FileContent, Partition};

use crate::config::{Digest, Resolved};
use crate::images::{self, Cache};
use crate::plan::Plan;

pub(crate) use kernel::digest as kernel_digest;
pub use limits::HostCgroup;

/// Why what a plan needs can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot open the guest's {what} {}; see {key} in the configuration", path.display())]
    Boot {
        what: &'static str,
        path: PathBuf,
        key: &'static str,
        source: io::Error,
    },
    #[error("The guest kernel {} has SHA-256 {found}; kernel.sha256 says {expected}", path.display())]
    Digest {
        path: PathBuf,
        found: Digest,
        expected: Digest,
    },
    #[error("Cannot give the guest a copy of {}", path.display())]
    HostFile { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Image(#[from] images::Error),
}

/// What a machine is started with.
#[derive(Debug)]
pub struct Resources {
    /// In the plan's order.
    pub disks: Vec<AcquiredDisk>,
    /// As the guest is told of them.
    pub files: Vec<FileContent>,
    pub kernel: File,
    pub initramfs: File,
}

/// A disk, opened. The open files are all there is to hold on to: they keep cached images from being
/// removed and a snapshot's disk from others, and a disk of the machine's own is gone when it is closed.
#[derive(Debug)]
pub struct AcquiredDisk {
    /// One, or several that are only read and follow each other.
    pub files: Vec<File>,
    /// What the agent is to make of it.
    pub partitions: Vec<Partition>,
    pub serial: String,
    pub read_only: bool,
}

/// Acquires what `plan` needs. Blocks, the first time an image is used for as long as it takes to
/// make file systems of its layers.
///
/// # Errors
/// Something isn't there or can't be made.
pub fn acquire(plan: &Plan, config: &Resolved) -> Result<Resources, Error> {
    for left_out in &plan.left_out {
        tracing::debug!(
            key = left_out.key,
            reason = left_out.reason,
            "Left out of the guest"
        );
    }
    let cache = Cache::open(config)?;
    let kernel = kernel::open(config)?;
    let initramfs = &config.kernel.initramfs.0;
    let initramfs = File::open(initramfs).map_err(|source| Error::Boot {
        what: "initramfs",
        path: initramfs.clone(),
        key: "kernel.initramfs",
        source,
    })?;
    Ok(Resources {
        disks: rootfs::disks(&plan.disks, &cache)?,
        files: files::read(&plan.files)?,
        kernel,
        initramfs,
    })
}

#[cfg(test)]
mod tests;
