//! A vsock device as data. Connections are not of it: their other ends are programs of the host.

use serde::{Deserialize, Serialize};

use super::MIN_CID;
use crate::devices::virtio::StateError;

/// What a vsock device is, beside its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context id; a restored guest can have another.
    pub cid: u32,
}

impl VsockState {
    pub(super) fn check(self) -> Result<(), StateError> {
        if (MIN_CID..u32::MAX).contains(&self.cid) {
            return Ok(());
        }
        let expected = format!("{MIN_CID} to 4294967294");
        Err(StateError::value("Context id", self.cid, expected))
    }
}
