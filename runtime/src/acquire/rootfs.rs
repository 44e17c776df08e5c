//! The disks of a root file system.

use super::AcquiredDisk;
use crate::images::{Cache, Error};
use crate::plan::{Disk, Source};

/// Opens or makes each disk. Nothing of them needs an entry in the ledger: images belong to the
/// cache, and a machine's own disks have no name.
pub(super) fn disks(disks: &[Disk], cache: &Cache) -> Result<Vec<AcquiredDisk>, Error> {
    disks
        .iter()
        .map(|disk| {
            let file = match &disk.source {
                Source::Layer { directory } => cache.layer(directory)?,
                Source::MergedLayers { directories } => cache.merged(directories)?,
                Source::Copy { directory } => cache.copy(directory)?,
                Source::Writable { size } => cache.writable(*size)?,
            };
            Ok(AcquiredDisk {
                file,
                serial: disk.serial.clone(),
                read_only: disk.read_only,
            })
        })
        .collect()
}
