//! A disk as data: what its driver found. The contents are a backend's.

use serde::{Deserialize, Serialize};

use super::wire::Disk;
use crate::devices::virtio::StateError;

/// What a disk is, beside its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
}

impl BlockState {
    /// Whether a driver that found this can go on with `disk`. It hears of another size; whether it
    /// may write it has negotiated once and for all.
    pub(super) fn check(self, disk: Disk) -> Result<(), StateError> {
        if self.read_only == disk.read_only {
            return Ok(());
        }
        Err(StateError::value(
            "Disk's read_only",
            self.read_only,
            format!("{}, as the disk now is", disk.read_only),
        ))
    }
}
