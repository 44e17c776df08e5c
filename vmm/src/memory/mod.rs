//! Guest RAM: mapped here, shared with every device, discarded page by page for the balloon.

#![allow(unsafe_code)]

mod mapping;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};

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
    /// Set where discarding is not a matter between this process and its kernel alone.
    stage_two: OnceLock<Box<dyn StageTwo>>,
}

#[derive(Debug)]
struct Region {
    view: GuestRegionMmap,
    /// Unmaps when dropped; `view` only points into it, so it is dropped after `view`.
    mapping: Mapping,
}

/// The hypervisor's own map of guest RAM, where it holds on to pages by itself: such memory is
/// unmapped, replaced and mapped again to be given back. Linux needs none, as KVM follows this
/// process's map.
pub trait StageTwo: fmt::Debug + Send + Sync {
    /// Bytes that go and come as one, aligned in the guest: a power of two, and whole pages of the
    /// host.
    fn unit(&self) -> u64;

    /// Takes `len` bytes at a guest address, whole units, out of the guest's map; all or none.
    fn unmap(&self, start: GuestAddress, len: u64) -> io::Result<()>;

    /// Maps them again, where in the host they were.
    fn map(&self, start: GuestAddress, len: u64) -> io::Result<()>;
}

/// A range of guest RAM that begins as a part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// First guest address.
    pub start: GuestAddress,
    /// Bytes.
    pub size: u64,
    /// Where in the file they are.
    pub offset: u64,
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
    /// The file ends before the guest's RAM does: to touch that would end the VMM.
    #[error("File of guest RAM has {len} bytes, {needed} are needed")]
    ShortFile {
        /// Bytes there are.
        len: u64,
        /// Bytes there must be.
        needed: u64,
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
    /// The range does not start and end where it can be cut.
    #[error("Range {start:#x}+{len:#x} is not made of whole units of {unit} bytes")]
    Unaligned {
        /// First guest address.
        start: u64,
        /// Bytes.
        len: u64,
        /// Bytes that can only be discarded together.
        unit: u64,
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
        Self::build(ranges, |_, bytes| Mapping::anonymous(bytes))
    }

    /// The same in files without a name, so that another process can map them.
    ///
    /// # Errors
    /// As [`anonymous`](Self::anonymous).
    #[cfg(target_os = "linux")]
    pub fn shared(ranges: &[(GuestAddress, u64)]) -> Result<Self, MemoryError> {
        Self::build(ranges, |_, bytes| Mapping::shared(bytes))
    }

    /// Maps parts of `file` so that each guest has a copy of its own of what it writes, and shares
    /// the rest with whoever maps the same file. Nothing is read before it is touched. The file must
    /// not get shorter while the memory is in use.
    ///
    /// # Errors
    /// As [`anonymous`](Self::anonymous), and [`MemoryError::ShortFile`].
    pub fn from_file(file: &File, ranges: &[FileRange]) -> Result<Self, MemoryError> {
        let needed = ranges
            .iter()
            .map(|range| range.offset.saturating_add(range.size))
            .max()
            .unwrap_or(0);
        let map = |source| MemoryError::Map {
            size: needed,
            source,
        };
        let len = file.metadata().map_err(map)?.len();
        if len < needed {
            return Err(MemoryError::ShortFile { len, needed });
        }
        let places: Vec<_> = ranges
            .iter()
            .map(|range| (range.start, range.size))
            .collect();
        Self::build(&places, |index, bytes| {
            let offset = ranges.get(index).map_or(0, |range| range.offset);
            Mapping::private_file(bytes, file, offset)
        })
    }

    /// Lays a part of another file over memory that was made [`from_file`](Self::from_file), within
    /// one region; all as there.
    ///
    /// # Errors
    /// Another range, a file that is too short, or a host that refuses.
    pub fn overlay(&self, file: &File, range: FileRange) -> Result<(), MemoryError> {
        let FileRange {
            start,
            size,
            offset,
        } = range;
        let map = |source| MemoryError::Map { size, source };
        let needed = offset.saturating_add(size);
        let len = file.metadata().map_err(map)?.len();
        if len < needed {
            return Err(MemoryError::ShortFile { len, needed });
        }
        let (region, at) = self.place(start, size).map_err(|_| MemoryError::BadRange {
            start: start.0,
            size,
        })?;
        region.mapping.overlay(at, size, file, offset).map_err(map)
    }

    fn build(
        ranges: &[(GuestAddress, u64)],
        make: impl Fn(usize, usize) -> io::Result<Mapping>,
    ) -> Result<Self, MemoryError> {
        let mut regions: Vec<Region> = Vec::with_capacity(ranges.len());
        let mut free_from = 0;
        for (index, &(start, size)) in ranges.iter().enumerate() {
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
            let mapping = make(index, bytes).map_err(|source| MemoryError::Map { size, source })?;
            // SAFETY: the mapping is `bytes` long, readable and writable, and lives in the same
            // `Region`, behind the view. The view does not look at its flags.
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
            ram: Arc::new(Ram {
                regions,
                stage_two: OnceLock::new(),
            }),
        })
    }

    /// Has [`discard`](Self::discard) go through a hypervisor that holds on to pages. Only the
    /// first call counts.
    pub fn set_stage_two(&self, stage_two: Box<dyn StageTwo>) {
        // A second hypervisor for the same memory is not to be had.
        let _ = self.ram.stage_two.set(stage_two);
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

    /// Bytes in a page of the host.
    pub fn host_page(&self) -> u64 {
        mapping::host_page()
    }

    /// What [`discard`](Self::discard) works in: a page of the host, or what the hypervisor takes
    /// from a guest as one.
    pub fn discard_unit(&self) -> u64 {
        let stage_two = self.ram.stage_two.get();
        stage_two.map_or_else(mapping::host_page, |stage_two| stage_two.unit())
    }

    /// Gives `len` bytes from `start` back to the host; the guest reads zeroes there until it writes
    /// again. Both are multiples of [`discard_unit`](Self::discard_unit); the range lies within one
    /// region.
    ///
    /// # Errors
    /// A range that is not whole units of one region, or a host that refuses; nothing was discarded
    /// in the former case.
    pub fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError> {
        let unit = self.discard_unit();
        if !start.0.is_multiple_of(unit) || !len.is_multiple_of(unit) {
            return Err(DiscardError::Unaligned {
                start: start.0,
                len,
                unit,
            });
        }
        let (region, offset) = self.place(start, len)?;
        let done = match self.ram.stage_two.get() {
            None => region.mapping.discard(offset, len),
            Some(stage_two) => region.renew(&**stage_two, start, offset, len),
        };
        done.map_err(|source| DiscardError::Host {
            start: start.0,
            len,
            source,
        })
    }

    /// Bytes of the range that the host has in memory, in whole host pages. It lies within one
    /// region and begins on a host page. Of RAM that began as a file, pages of that file count too.
    ///
    /// # Errors
    /// As [`discard`](Self::discard).
    pub fn resident(&self, start: GuestAddress, len: u64) -> Result<u64, DiscardError> {
        let (region, offset) = self.place(start, len)?;
        region
            .mapping
            .resident(offset, len)
            .map_err(|source| DiscardError::Host {
                start: start.0,
                len,
                source,
            })
    }

    /// The region that holds all of a range, and where in it that begins.
    fn place(&self, start: GuestAddress, len: u64) -> Result<(&Region, u64), DiscardError> {
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
        Ok((region, offset))
    }
}

impl Region {
    /// Replaces memory while the guest has no map of it. What fails before the last step leaves the
    /// guest with the old memory.
    fn renew(
        &self,
        stage_two: &dyn StageTwo,
        start: GuestAddress,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        stage_two.unmap(start, len)?;
        let renewed = self.mapping.renew(offset, len);
        stage_two.map(start, len)?;
        renewed
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
