//! A snapshot in words.

use std::fmt;

use super::format::{Kind, VERSION};
use super::{SnapshotError, SnapshotFile};
use crate::devices::virtio::transport::mmio::TransportState;
use crate::machine::MachineState;

/// What a person wants to know of a snapshot; its [`Display`](fmt::Display) is a few lines of text.
#[derive(Debug)]
pub struct Description {
    head: [(&'static str, String); 3],
    machine: MachineState,
    devices: Vec<TransportState>,
    memory: String,
    sections: Vec<(Kind, u32, usize)>,
}

impl SnapshotFile {
    /// Describes the snapshot.
    ///
    /// # Errors
    /// Sections that are not what they should be.
    pub fn describe(&self) -> Result<Description, SnapshotError> {
        let base = self.base().map(|base| base.to_string());
        let sections = self.sections();
        Ok(Description {
            head: [
                ("format", VERSION.to_string()),
                ("id", self.id().to_string()),
                (
                    "base",
                    base.unwrap_or_else(|| "none: a full snapshot".to_owned()),
                ),
            ],
            machine: self.state(Kind::Machine, 0)?,
            devices: self.state(Kind::Devices, 0)?,
            memory: format!(
                "{} KiB in {} extents",
                self.memory_len() >> 10,
                self.image.extents.len()
            ),
            sections: sections
                .map(|(kind, index, bytes)| (kind, index, bytes.len()))
                .collect(),
        })
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.head {
            writeln!(f, "{name:<8} {value}")?;
        }
        let MachineState {
            arch,
            vcpus,
            memory,
            ..
        } = &self.machine;
        writeln!(
            f,
            "{:<8} {arch}, {vcpus} vCPUs, {} KiB of RAM",
            "machine",
            memory >> 10
        )?;
        writeln!(f, "{:<8} {}", "RAM", self.memory)?;
        for device in &self.devices {
            let ready = device.queues.iter().filter(|queue| queue.ready).count();
            writeln!(
                f,
                "{:<8} {}: status {:#x}, {ready} of {} queues",
                "device",
                device.id.escape_debug(),
                device.status,
                device.queues.len()
            )?;
        }
        for (kind, index, bytes) in &self.sections {
            writeln!(f, "{:<8} {kind:?} {index}: {bytes} bytes", "section")?;
        }
        Ok(())
    }
}
