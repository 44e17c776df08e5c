//! How a VM ends.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The guest switched off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's processor shut down: a triple fault. Linux with `reboot=t` on its command line
    /// resets so, also after a panic.
    TripleFault,
    /// The host stopped it.
    Stopped,
    /// A vCPU could not go on, or the VMM failed.
    Fault(String),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("power-off"),
            Self::Reset => f.write_str("reset"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Stopped => f.write_str("stopped"),
            Self::Fault(reason) => write!(f, "fault: {reason}"),
        }
    }
}
