//! What the targets share. Run one with `cargo +nightly fuzz run block -- -max_total_time=60`.
//!
//! A target is a whole device behind the driver model of `supermachine_vmm::testing`: the input is a
//! script of what a driver does, good manners or bad. The device may fault; it may not panic, and it
//! comes to rest. Inputs also go through the device's pure parser, with its promises asserted.

use supermachine_vmm::devices::virtio::VirtioDevice;
use supermachine_vmm::testing::{Rig, hostile};

/// Has a driver misbehave as `script` says, then resets the device.
pub fn misbehave<D: VirtioDevice>(device: D, script: &[u8]) {
    let mut rig = Rig::new(device);
    hostile::run(&mut rig, script);
    rig.device.reset();
}
