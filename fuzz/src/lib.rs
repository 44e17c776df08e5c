//! What the targets share. Run one with `cargo +nightly fuzz run block -- -max_total_time=60`.
//!
//! A target is a whole device behind the driver model of `supermachine_vmm::testing`: the input is a
//! script of what a driver does, good manners or bad. The device may fault; it may not panic, and it
//! comes to rest. Inputs also go through the device's pure parser, with its promises asserted.

use std::io;

use supermachine_vmm::devices::virtio::VirtioDevice;
use supermachine_vmm::devices::virtio::block::Backend;
use supermachine_vmm::testing::{Rig, hostile};
use vm_memory::VolatileSlice;

/// Has a driver misbehave as `script` says, then resets the device.
pub fn misbehave<D: VirtioDevice>(device: D, script: &[u8]) {
    let mut rig = Rig::new(device);
    hostile::run(&mut rig, script);
    rig.device.reset();
}

/// A disk in memory that notices accesses outside of it.
#[derive(Debug)]
pub struct MemoryDisk(pub Vec<u8>);

impl MemoryDisk {
    fn range(&mut self, offset: u64, len: u64) -> &mut [u8] {
        let start = usize::try_from(offset).expect("an offset on the disk");
        let len = usize::try_from(len).expect("a length on the disk");
        &mut self.0[start..start + len]
    }
}

impl Backend for MemoryDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, mut offset: u64, into: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        for slice in into {
            slice.copy_from(self.range(offset, slice.len() as u64));
            offset += slice.len() as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut offset: u64, from: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        for slice in from {
            slice.copy_to(self.range(offset, slice.len() as u64));
            offset += slice.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.range(offset, len).fill(0);
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.range(offset, len).fill(0);
        Ok(())
    }
}
