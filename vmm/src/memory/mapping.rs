//! One anonymous mapping of the host, aligned so that the host can back it with huge pages.

use std::io;
use std::ptr::NonNull;

use super::Discarded;

/// Size and alignment of a huge page of the host, in bytes.
pub const HUGE_PAGE: usize = 2 << 20;

#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is plain memory owned by this value; all access to its contents goes through
// vm-memory's volatile accessors.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference into the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes (a multiple of the page size) of zeroes at a 2 MiB boundary.
    pub(super) fn anonymous(size: usize) -> io::Result<Self> {
        // mmap only promises page alignment: reserve one huge page more and trim both ends.
        let reserved = size
            .checked_add(HUGE_PAGE)
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = start.align_offset(HUGE_PAGE);
        let base = start.wrapping_byte_add(before);
        // SAFETY: both ranges lie within the mapping made above and outside [base, base + size).
        unsafe {
            if before > 0 {
                libc::munmap(start, before);
            }
            libc::munmap(base.wrapping_byte_add(size), HUGE_PAGE - before);
        }
        // Huge pages are a matter of speed: a host without them still runs the guest.
        #[cfg(target_os = "linux")]
        // SAFETY: advice on the mapping made above.
        unsafe {
            libc::madvise(base, size, libc::MADV_HUGEPAGE);
            // Guest RAM has no place in a core dump of the VMM.
            libc::madvise(base, size, libc::MADV_DONTDUMP);
        }
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, size })
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Drops the pages in `offset..offset + len`, which the caller has checked to be page-aligned
    /// and within the mapping.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<Discarded> {
        let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range was just checked to lie within this mapping; private anonymous pages
        // read as zero afterwards, which every reader of guest memory must expect of a guest.
        let result = unsafe {
            libc::madvise(
                self.as_ptr().wrapping_add(offset).cast(),
                len,
                libc::MADV_DONTNEED,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Discarded::Freed)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and views of it are dropped before it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

pub(super) fn host_page() -> u64 {
    // SAFETY: sysconf only reads.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(page).unwrap_or(4096)
}
