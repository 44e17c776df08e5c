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
        limit: 1 << 20,
        deflate_on_oom: true,
        page_reporting: true,
        stats: true,
    };
    misbehave(Balloon::new(config).expect("a descriptor"), data);
});
