//! General registers by number, and the system registers that guests touch in vain.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use applevisor::vcpu::Reg;

/// X0 to X30 in order; the 31st register of an instruction is zero.
pub(super) const GENERAL: [Reg; 31] = [
    Reg::X0,
    Reg::X1,
    Reg::X2,
    Reg::X3,
    Reg::X4,
    Reg::X5,
    Reg::X6,
    Reg::X7,
    Reg::X8,
    Reg::X9,
    Reg::X10,
    Reg::X11,
    Reg::X12,
    Reg::X13,
    Reg::X14,
    Reg::X15,
    Reg::X16,
    Reg::X17,
    Reg::X18,
    Reg::X19,
    Reg::X20,
    Reg::X21,
    Reg::X22,
    Reg::X23,
    Reg::X24,
    Reg::X25,
    Reg::X26,
    Reg::X27,
    Reg::X28,
    Reg::X29,
    Reg::X30,
];

/// System registers that a guest has been told about in the log: each once in a process's life.
static TOLD: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// As many are told of: a guest could go through all encodings.
const MOST: usize = 64;

/// Whether this is the first access to a system register nobody knows.
pub(super) fn is_news(encoding: u32) -> bool {
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    told.len() < MOST && told.insert(encoding)
}
