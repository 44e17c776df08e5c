//! A balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::{balloon, misbehave};
use supermachine_vmm::devices::virtio::balloon::wire::{Stats, pfns};

fuzz_target!(|data: &[u8]| {
    assert_eq!(pfns(data).count(), data.len() / 4);
    let _ = Stats::parse(data);
    misbehave(balloon(), data);
});
