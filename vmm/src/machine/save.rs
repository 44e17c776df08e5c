//! A paused VM as a snapshot.

use std::fs::File;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::board::PortState;
use super::run::Running;
use crate::error::SaveError;
use crate::snapshot::{Id, Kind, SnapshotFile, image};
use crate::vcpu::encode;

/// The shape of a machine, as far as its devices don't tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineState {
    /// The architecture, as Rust names it.
    pub(crate) arch: String,
    pub(crate) vcpus: u32,
    /// Bytes of guest RAM.
    pub(crate) memory: u64,
    /// The serial port, if there is one.
    pub(crate) serial: Option<PortState>,
}

impl Running {
    /// Writes a paused VM to `file`, as what is different from the last of `base` if that is given.
    /// Devices go on when this returns, vCPUs when they are resumed.
    pub(super) fn save(&self, file: &File, base: Option<&[SnapshotFile]>) -> Result<Id, SaveError> {
        let held = self.hold()?;
        let devices = self.shared.devices.quiesce()?;
        let vcpus = held.save_vcpus()?;
        let vm = (self.save_vm)()?;
        let machine = MachineState {
            arch: std::env::consts::ARCH.to_owned(),
            vcpus: u32::try_from(vcpus.len()).unwrap_or(u32::MAX),
            memory: self.memory.iter().map(GuestMemoryRegion::len).sum(),
            serial: devices.port(),
        };
        let mut sections = vec![(Kind::Machine, 0, encode(&machine)?), (Kind::Vm, 0, vm)];
        let numbered = (0..).zip(vcpus);
        sections.extend(numbered.map(|(index, vcpu)| (Kind::Vcpu, index, vcpu)));
        sections.push((Kind::Devices, 0, encode(&devices.save())?));
        let id = image::write(file, &self.memory, sections, base)?;
        // Whoever ended it meanwhile may have reset its devices.
        held.check()?;
        Ok(id)
    }
}
