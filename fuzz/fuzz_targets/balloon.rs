//! A balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::misbehave;
use supermachine_vmm::devices::virtio::balloon::wire::{Stats, pfns};
use supermachine_vmm::devices::virtio::balloon::{Balloon, BalloonConfig};

fuzz_target!(|data: &[u8]| {
    assert_eq!(pfns(data).count(), data.len() / 4);
    let _ = Stats::parse(data);
    let config = BalloonConfig {
        free_page_hint: true,
        ..BalloonConfig::default()
    };
    misbehave(Balloon::new(config, 1 << 20).expect("a descriptor"), data);
});
