//! Guest memory with an allocator.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// A piece of guest memory in a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device may write it, or else read it.
    pub writable: bool,
}

impl Buffer {
    /// For the device to read.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: false,
        }
    }

    /// For the device to write.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: true,
        }
    }

    /// The parts before and behind `at`.
    pub fn split(self, at: u32) -> (Self, Self) {
        let behind = Self {
            addr: self.addr + u64::from(at),
            len: self.len - at,
            ..self
        };
        (Self { len: at, ..self }, behind)
    }
}

/// Memory of a guest, handed out piece by piece. Clones share both.
#[derive(Clone, Debug)]
pub struct Guest {
    memory: GuestMemory,
    next: Arc<AtomicU64>,
}

impl Guest {
    /// A guest with `size` bytes of RAM from address 0.
    pub fn new(size: u64) -> Self {
        Self::with_ranges(&[(0, size)])
    }

    /// A guest with RAM at each `(address, bytes)`; allocations come from the first.
    pub fn with_ranges(ranges: &[(u64, u64)]) -> Self {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(at, size)| (GuestAddress(at), size))
            .collect();
        let memory = GuestMemory::anonymous(&ranges).expect("RAM for a test");
        // No allocation at the very beginning: address 0 means "unset" in queue registers.
        let first = ranges.first().expect("a range").0.0 + 4096;
        Self {
            memory,
            next: Arc::new(AtomicU64::new(first)),
        }
    }

    /// The memory itself.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The first address behind the first range.
    pub fn end(&self) -> u64 {
        let region = self.memory.iter().next().expect("a range");
        region.start_addr().0 + region.len()
    }

    /// Takes `len` bytes at a multiple of `align`.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let take = |next: u64| Some(next.next_multiple_of(align) + len);
        let before = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .expect("always some");
        let at = before.next_multiple_of(align);
        assert!(
            at + len <= self.end(),
            "the test guest has run out of memory"
        );
        at
    }

    /// A readable buffer holding `data`.
    pub fn put(&self, data: &[u8]) -> Buffer {
        let addr = self.alloc(data.len() as u64, 16);
        self.write(addr, data);
        Buffer::readable(addr, u32::try_from(data.len()).expect("a small buffer"))
    }

    /// A writable buffer of `len` bytes, filled with `0xaa`.
    pub fn room(&self, len: u32) -> Buffer {
        let addr = self.alloc(u64::from(len), 16);
        self.write(addr, &vec![0xaa; len as usize]);
        Buffer::writable(addr, len)
    }

    /// Writes `data` at `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(addr))
            .expect("an address in RAM");
    }

    /// Reads `len` bytes at `addr`.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(addr))
            .expect("an address in RAM");
        data
    }

    /// What is in `buffer`.
    pub fn contents(&self, buffer: Buffer) -> Vec<u8> {
        self.read(buffer.addr, buffer.len as usize)
    }

    /// How many pages of the host hold something in `addr..addr + len`, which lies within one range
    /// of RAM.
    pub fn resident(&self, addr: u64, len: u64) -> u64 {
        let bytes = self
            .memory
            .resident(GuestAddress(addr), len)
            .expect("an address in RAM");
        bytes / self.memory.host_page()
    }
}
