//! A disk in memory.

use std::io;

use vm_memory::VolatileSlice;

use crate::devices::virtio::block::Backend;

/// A disk in memory that panics at accesses outside of it.
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
