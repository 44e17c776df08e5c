//! A console with several ports.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::{console, misbehave};
use supermachine_vmm::devices::virtio::console::wire::FromDriver;

fuzz_target!(|data: &[u8]| {
    let _ = FromDriver::parse(data);
    misbehave(console(), data);
});
