//! Guest RAM: allocated here, shared with every device, discarded page by page for the balloon.

#![allow(unsafe_code)]

mod mapping;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

pub use mapping::HUGE_PAGE;
use mapping::Mapping;

/// Guest RAM as every part of the VMM sees it; cloning is cheap and shares the memory.
///
/// Implements [`vm_memory::GuestMemoryBackend`], so it is a [`vm_memory::GuestMemory`] and a
/// [`vm_memory::Bytes`] over [`GuestAddress`]: all accesses are bounds-checked.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    ram: Arc<Ram>,
}

#[derive(Debug)]
struct Ram {
    /// Sorted by guest address and never overlapping.
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    view: GuestRegionMmap,
    /// Unmaps when dropped; `view` only points into it, so it is dropped after `view`.
    mapping: Mapping,
}

/// What [`GuestMemory::discard`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// The pages went back to the host; the guest reads zeroes there until it writes again.
    Freed,
}

/// Why guest RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no such amount of address space or memory.
    #[error("Cannot map {size} bytes of guest RAM")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What `mmap` answered.
        source: io::Error,
    },
    /// Ranges must be page-aligned, not empty, ascending and disjoint.
    #[error(
        "Guest RAM range {start:#x}+{size:#x} is empty, not page-aligned, or overlaps the one before"
    )]
    BadRange {
        /// First guest address.
        start: u64,
        /// Bytes.
        size: u64,
    },
}

/// Why a range was not discarded.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// The range does not lie within one region of guest RAM.
    #[error("Range {start:#x}+{len:#x} is not guest RAM")]
    NotRam {
        /// First guest address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// The range does not start and end on a host page.
    #[error("Range {start:#x}+{len:#x} is not made of whole host pages of {page} bytes")]
    Unaligned {
        /// First guest address.
        start: u64,
        /// Bytes.
        len: u64,
        /// Bytes in a host page.
        page: u64,
    },
    /// The host refused.
    #[error("Host did not discard {len:#x} bytes of guest RAM at {start:#x}")]
    Host {
        /// First guest address.
        start: u64,
        /// Bytes.
        len: u64,
        /// What the system call answered.
        source: io::Error,
    },
}

impl GuestMemory {
    /// Allocates anonymous memory for each `(start, bytes)` range, zeroed, 2 MiB-aligned in the host
    /// and offered to it for huge pages. Ranges ascend and are disjoint.
    ///
    /// # Errors
    /// [`MemoryError::BadRange`] for a range that is empty, not made of 4 KiB pages or out of order;
    /// [`MemoryError::Map`] when the host refuses.
    pub fn anonymous(ranges: &[(GuestAddress, u64)]) -> Result<Self, MemoryError> {
        let mut regions: Vec<Region> = Vec::with_capacity(ranges.len());
        let mut free_from = 0;
        for &(start, size) in ranges {
            let bad = || MemoryError::BadRange {
                start: start.0,
                size,
            };
            let end = start.0.checked_add(size).ok_or_else(bad)?;
            if size == 0 || start.0 < free_from || start.0 % 4096 != 0 || size % 4096 != 0 {
                return Err(bad());
            }
            free_from = end;
            let bytes = usize::try_from(size).map_err(|_| bad())?;
            let mapping =
                Mapping::anonymous(bytes).map_err(|source| MemoryError::Map { size, source })?;
            // SAFETY: the mapping is `bytes` long, readable and writable, and lives in the same
            // `Region`, behind the view.
            let view = unsafe {
                MmapRegion::build_raw(
                    mapping.as_ptr(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                )
            }
            .map_err(|error| MemoryError::Map {
                size,
                source: io::Error::other(error),
            })?;
            let view = GuestRegionMmap::new(view, start).ok_or_else(bad)?;
            regions.push(Region { view, mapping });
        }
        Ok(Self {
            ram: Arc::new(Ram { regions }),
        })
    }

    /// Each region as guest address, host address and length, for the hypervisor to map.
    pub fn host_ranges(&self) -> impl Iterator<Item = (GuestAddress, *mut u8, u64)> {
        self.ram.regions.iter().map(|region| {
            (
                region.view.start_addr(),
                region.mapping.as_ptr(),
                region.view.len(),
            )
        })
    }

    /// All guest RAM, in bytes.
    pub fn size(&self) -> u64 {
        self.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Bytes in a page of the host: what [`discard`](Self::discard) works in.
    pub fn host_page(&self) -> u64 {
        mapping::host_page()
    }

    /// Gives `len` bytes from `start` back to the host. Both are multiples of
    /// [`host_page`](Self::host_page); the range lies within one region.
    ///
    /// # Errors
    /// A range that is not whole pages of one region, or a host that refuses; nothing was discarded
    /// in the former case.
    pub fn discard(&self, start: GuestAddress, len: u64) -> Result<Discarded, DiscardError> {
        let page = self.host_page();
        if !start.0.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(DiscardError::Unaligned {
                start: start.0,
                len,
                page,
            });
        }
        let not_ram = || DiscardError::NotRam {
            start: start.0,
            len,
        };
        let region = self
            .ram
            .regions
            .iter()
            .find(|region| region.view.to_region_addr(start).is_some())
            .ok_or_else(not_ram)?;
        let offset = start.raw_value() - region.view.start_addr().raw_value();
        let end = offset.checked_add(len).ok_or_else(not_ram)?;
        if end > region.view.len() {
            return Err(not_ram());
        }
        region
            .mapping
            .discard(offset, len)
            .map_err(|source| DiscardError::Host {
                start: start.0,
                len,
                source,
            })
    }
}

impl GuestMemoryBackend for GuestMemory {
    type R = GuestRegionMmap;

    fn num_regions(&self) -> usize {
        self.ram.regions.len()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        // At most a handful of regions: a scan beats a search.
        self.iter()
            .find(|region| region.to_region_addr(addr).is_some())
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.ram.regions.iter().map(|region| &region.view)
    }
}
