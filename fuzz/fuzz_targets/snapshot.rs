//! Snapshots of any bytes: head, extents and states are taken or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_vmm::snapshot::parse_anything;

fuzz_target!(|data: &[u8]| parse_anything(data));
