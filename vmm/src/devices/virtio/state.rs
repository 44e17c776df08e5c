//! What a device is at a moment, as data: taken from one that is held still, given to a fresh one.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::block::BlockState;
use super::console::ConsoleState;
use super::vsock::VsockState;

/// A device without its transport. One that comes out of a file can hold anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum DeviceState {
    /// See [`BalloonState`].
    Balloon(BalloonState),
    /// See [`BlockState`].
    Block(BlockState),
    /// See [`ConsoleState`].
    Console(ConsoleState),
    /// It has none: what it gives is forgotten.
    Rng,
    /// See [`VsockState`].
    Vsock(VsockState),
}

impl DeviceState {
    /// Whose it is.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Balloon(_) => "balloon",
            Self::Block(_) => "block",
            Self::Console(_) => "console",
            Self::Rng => "rng",
            Self::Vsock(_) => "vsock",
        }
    }
}

/// How far a device is with a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The next entry of the available ring to look at.
    pub avail: u16,
    /// The next entry of the used ring to fill.
    pub used: u16,
}

/// How far a device is with the queues it works on, by number.
pub type Positions = Vec<(u16, Position)>;

/// What [`VirtioDevice::save`](super::VirtioDevice::save) answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The queues the device works on, by number.
    pub queues: Positions,
    /// Everything else.
    pub device: DeviceState,
}

/// Why a device can't become what a state says.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state is of another kind of device.
    #[error("State of a {found} device, expected {expected}")]
    Kind {
        /// What came.
        found: &'static str,
        /// What the device is.
        expected: &'static str,
    },
    /// A value that the device can't have.
    #[error("{field} is {value}, expected {expected}")]
    Value {
        /// What it is of.
        field: &'static str,
        /// What came.
        value: String,
        /// What it can be.
        expected: String,
    },
}

impl StateError {
    pub(super) fn kind(found: &DeviceState, expected: &'static str) -> Self {
        let found = found.name();
        Self::Kind { found, expected }
    }

    pub(super) fn value(
        field: &'static str,
        value: impl ToString,
        expected: impl ToString,
    ) -> Self {
        Self::Value {
            field,
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// The device can't be held still: its thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("Device {device} can't be held still")]
pub struct QuiesceError {
    /// Its id.
    pub device: String,
}
