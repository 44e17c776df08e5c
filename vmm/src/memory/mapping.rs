//! One mapping of the host, aligned so that the host can back it with huge pages, and how its pages
//! are given back: that depends on what they are kept in.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Size and alignment of a huge page of the host, in bytes.
pub const HUGE_PAGE: usize = 2 << 20;

#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    size: usize,
    backing: Backing,
}

/// What the host keeps the pages in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    /// Memory of this process alone.
    Anonymous,
    /// A file in memory that other mappings may show as well.
    #[cfg(target_os = "linux")]
    Shared,
    /// A file of which this mapping shows a copy: pages that were written are this process's alone.
    PrivateFile,
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
                ANONYMOUS,
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
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mapping = Self {
            base,
            size,
            backing: Backing::Anonymous,
        };
        mapping.advise(0, size);
        Ok(mapping)
    }

    /// Maps `size` bytes of zeroes in a file of its own that has no name.
    #[cfg(target_os = "linux")]
    pub(super) fn shared(size: usize) -> io::Result<Self> {
        use std::os::fd::{FromRawFd, OwnedFd};
        // SAFETY: the name is a string that ends with NUL.
        let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made above and is nobody else's.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(size as u64)?;
        let mut mapping = Self::anonymous(size)?;
        mapping.place(0, size, libc::MAP_SHARED, Some((&file, 0)))?;
        mapping.backing = Backing::Shared;
        Ok(mapping)
    }

    /// Maps `size` bytes of `file` from `offset` on: a copy, of which the host only keeps what is
    /// written. Nothing is read before it is touched.
    pub(super) fn private_file(size: usize, file: &File, offset: u64) -> io::Result<Self> {
        let mut mapping = Self::anonymous(size)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        mapping.place(0, size, flags, Some((file, offset)))?;
        mapping.backing = Backing::PrivateFile;
        Ok(mapping)
    }

    /// Puts `len` bytes of another file in place of what a private file had at `offset`, as privately.
    pub(super) fn overlay(&self, offset: u64, len: u64, file: &File, from: u64) -> io::Result<()> {
        let whole = [offset, len, from]
            .iter()
            .all(|value| value.is_multiple_of(host_page()));
        if self.backing != Backing::PrivateFile || !whole || len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (offset, len) = self.range(offset, len)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        self.place(offset, len, flags, Some((file, from)))?;
        self.advise(offset, len);
        Ok(())
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Drops the pages in `offset..offset + len`, which the caller has checked to be page-aligned
    /// and within the mapping; they read as zeroes from then on.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = self.range(offset, len)?;
        match self.backing {
            Backing::Anonymous => self.drop_pages(offset, len, libc::MADV_DONTNEED),
            // The file has the pages: what is dropped of the mapping alone stays in memory.
            #[cfg(target_os = "linux")]
            Backing::Shared => self.drop_pages(offset, len, libc::MADV_REMOVE),
            // Without its copy of a page a process sees the file's again, and so would the guest.
            Backing::PrivateFile => self.replace(offset, len),
        }
    }

    /// Puts fresh anonymous memory in place of `offset..offset + len`, checked as above. Unlike
    /// advice, that also frees what a hypervisor still holds on to.
    pub(super) fn renew(&self, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = self.range(offset, len)?;
        self.replace(offset, len)
    }

    /// Bytes of `offset..offset + len`, page-aligned, that the host has in memory. Of a private
    /// file that includes pages of its own that nobody here has touched.
    pub(super) fn resident(&self, offset: u64, len: u64) -> io::Result<u64> {
        let (offset, len) = self.range(offset, len)?;
        let page = host_page();
        let mut pages = vec![0_u8; (len as u64).div_ceil(page) as usize];
        // SAFETY: the range is within this mapping, and the answer has a byte for each page of it.
        let answer = unsafe { libc::mincore(self.at(offset), len, pages.as_mut_ptr().cast()) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().filter(|there| **there & 1 != 0).count() as u64 * page)
    }

    fn range(&self, offset: u64, len: u64) -> io::Result<(usize, usize)> {
        let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((offset, len))
    }

    fn at(&self, offset: usize) -> *mut libc::c_void {
        self.as_ptr().wrapping_add(offset).cast()
    }

    fn drop_pages(&self, offset: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the caller has checked the range; the pages read as zero afterwards, which every
        // reader of guest memory must expect of a guest.
        if unsafe { libc::madvise(self.at(offset), len, advice) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn replace(&self, offset: usize, len: usize) -> io::Result<()> {
        self.place(offset, len, ANONYMOUS, None)?;
        // The same advice everywhere lets the kernel join neighbours to one area, of which a
        // process has a limited number.
        self.advise(offset, len);
        Ok(())
    }

    /// Maps something else in a checked place of this mapping.
    fn place(
        &self,
        offset: usize,
        len: usize,
        flags: libc::c_int,
        file: Option<(&File, u64)>,
    ) -> io::Result<()> {
        let (fd, from) = file.map_or((-1, 0), |(file, from)| (file.as_raw_fd(), from));
        let from = libc::off_t::try_from(from).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: only memory of this mapping is replaced, and nobody holds references into it:
        // a concurrent access sees the old bytes or the new ones.
        let placed = unsafe {
            libc::mmap(
                self.at(offset),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                from,
            )
        };
        if placed == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Huge pages are a matter of speed: a host without them still runs the guest. And guest RAM
    /// has no place in a core dump of the VMM.
    #[cfg(target_os = "linux")]
    fn advise(&self, offset: usize, len: usize) {
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
            // SAFETY: advice on memory of this mapping that changes no contents.
            unsafe { libc::madvise(self.at(offset), len, advice) };
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn advise(&self, _offset: usize, _len: usize) {}
}

/// Memory without a file, and without a promise that there will be enough.
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

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
