//! A console as data. What is attached to its ports is the host's, and not of it.

use serde::{Deserialize, Serialize};

use super::MAX_PORTS;
use crate::devices::virtio::StateError;

/// Counts of messages beyond which none can have been exchanged: a thousand a second for a century.
const MAX_COUNT: u64 = 1 << 42;
/// The longest name a port can have, as the driver's buffers are a page.
const MAX_NAME: usize = 4096;

/// What a console is, beside its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    /// All ports there can be, from port 0.
    pub ports: Vec<PortState>,
    /// Absent while no driver is there, and for one that wants port 0 only.
    pub control: Option<ControlState>,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Shown to the guest; empty for none.
    pub name: String,
    /// Whether the driver is to know it.
    pub wanted: bool,
    /// The guest's side.
    pub guest: GuestState,
    /// Whoever is attached next has to wait until the guest has closed the port.
    pub stale: bool,
    /// What the driver knows.
    pub told: ToldState,
    /// It must hear of a close first.
    pub close_due: bool,
    /// Columns and rows of the terminal.
    pub size: Option<(u16, u16)>,
    /// Bytes of the guest's next buffer that the host has had already.
    pub taken: u64,
}

/// The guest's side of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// Nobody has it open.
    Closed,
    /// A process has it open.
    Open,
    /// It was closed; what was written before is still on its way.
    Draining,
}

/// What the driver knows of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToldState {
    /// That it is there.
    pub added: bool,
    /// It has answered that.
    pub ready: bool,
    /// Its name.
    pub named: bool,
    /// That the host has it open.
    pub open: bool,
    /// Columns and rows.
    pub size: Option<(u16, u16)>,
}

/// How far host and driver are with control messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlState {
    /// Buffers the driver has supplied, without those it is still to fill.
    pub supplied: u64,
    /// How many it had supplied when it announced itself.
    pub capacity: Option<u64>,
    /// Messages sent to it.
    pub sent: u64,
}

impl ConsoleState {
    /// Whether a console of `max_ports` can be this.
    pub(super) fn check(&self, max_ports: u32) -> Result<(), StateError> {
        let ports = self.ports.len();
        if ports != max_ports as usize || !(1..=MAX_PORTS).contains(&max_ports) {
            return Err(StateError::value(
                "Number of console ports",
                ports,
                max_ports,
            ));
        }
        for port in &self.ports {
            if port.name.len() > MAX_NAME {
                let length = port.name.len();
                return Err(StateError::value(
                    "Length of a port's name",
                    length,
                    "at most 4096",
                ));
            }
            if port.taken > u64::from(u32::MAX) {
                return Err(StateError::value(
                    "Bytes taken",
                    port.taken,
                    "at most 2^32 - 1",
                ));
            }
        }
        let control = self.control.unwrap_or(ControlState {
            supplied: 0,
            capacity: None,
            sent: 0,
        });
        for count in [
            control.supplied,
            control.capacity.unwrap_or(0),
            control.sent,
        ] {
            if count > MAX_COUNT {
                return Err(StateError::value(
                    "Count of control messages",
                    count,
                    "less",
                ));
            }
        }
        Ok(())
    }
}
