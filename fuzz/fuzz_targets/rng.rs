//! An entropy device.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::misbehave;
use supermachine_vmm::devices::virtio::rng::Rng;

fuzz_target!(|data: &[u8]| {
    let source = |bytes: &mut [u8]| {
        bytes.fill(4);
        Ok(())
    };
    misbehave(Rng::new(Arc::new(source)), data);
});
