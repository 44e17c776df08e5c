//! An entropy device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::{misbehave, rng};

fuzz_target!(|data: &[u8]| misbehave(rng(), data));
