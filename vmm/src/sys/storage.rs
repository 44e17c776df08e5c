//! What disks ask of files: positional vectored I/O, sizes, holes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use vm_memory::VolatileSlice;

/// The most slices one call takes (`IOV_MAX`).
const MAX_SLICES: usize = 1024;

/// Fills `slices` from `offset` on. Fails with `UnexpectedEof` when the file ends before.
pub fn read_exact_at(file: &File, offset: u64, slices: Vec<VolatileSlice<'_>>) -> io::Result<()> {
    transfer(
        offset,
        slices,
        io::ErrorKind::UnexpectedEof,
        |offset, slices| {
            let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
            let vector: Vec<_> = guards
                .iter()
                .map(|guard| libc::iovec {
                    iov_base: guard.as_ptr().cast(),
                    iov_len: guard.len(),
                })
                .collect();
            // SAFETY: each entry is guest memory that `guards` keep mapped during the call, and to
            // which this process holds no reference. At most MAX_SLICES of them.
            unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    vector.as_ptr(),
                    vector.len() as i32,
                    offset,
                )
            }
        },
    )
}

/// Writes `slices` from `offset` on.
pub fn write_all_at(file: &File, offset: u64, slices: Vec<VolatileSlice<'_>>) -> io::Result<()> {
    transfer(
        offset,
        slices,
        io::ErrorKind::WriteZero,
        |offset, slices| {
            let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
            let vector: Vec<_> = guards
                .iter()
                .map(|guard| libc::iovec {
                    iov_base: guard.as_ptr().cast_mut().cast(),
                    iov_len: guard.len(),
                })
                .collect();
            // SAFETY: each entry is guest memory that `guards` keep mapped during the call; the kernel
            // only reads it. At most MAX_SLICES of them.
            unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    vector.as_ptr(),
                    vector.len() as i32,
                    offset,
                )
            }
        },
    )
}

/// Repeats `call` until every byte has gone; `none` is the error when one moves nothing.
fn transfer(
    mut offset: u64,
    mut slices: Vec<VolatileSlice<'_>>,
    none: io::ErrorKind,
    call: impl Fn(libc::off_t, &[VolatileSlice<'_>]) -> libc::ssize_t,
) -> io::Result<()> {
    let mut first = 0;
    while let Some(rest) = slices.get(first..).filter(|rest| !rest.is_empty()) {
        let batch = rest.get(..MAX_SLICES).unwrap_or(rest);
        let from = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = match usize::try_from(call(from, batch)) {
            Ok(0) => return Err(none.into()),
            Ok(moved) => moved,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        offset += moved as u64;
        let mut left = moved;
        while let Some(slice) = slices.get_mut(first).filter(|_| left > 0) {
            let here = left.min(slice.len());
            left -= here;
            if here == slice.len() {
                first += 1;
            } else {
                *slice = slice.offset(here).map_err(io::Error::other)?;
            }
        }
    }
    Ok(())
}

/// Bytes in a regular file or a block device; anything else is refused.
pub fn size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(metadata.len());
    }
    if kind.is_block_device() {
        return block_device_size(file);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "Neither a regular file nor a block device",
    ))
}

/// Whether `file` was opened for writing.
pub fn is_writable(file: &File) -> io::Result<bool> {
    // SAFETY: takes and writes no pointers.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags & libc::O_ACCMODE != libc::O_RDONLY),
    }
}

/// Where its end is: no thread of the VMM may ask a device by ioctl.
#[cfg(target_os = "linux")]
fn block_device_size(mut file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0))
}

#[cfg(not(target_os = "linux"))]
fn block_device_size(_file: &File) -> io::Result<u64> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Deallocates a range, which reads as zeroes from then on. Fails with `Unsupported` where the
/// file system can't.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return allocate(
        file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    );
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Makes a range read as zeroes and keeps its space. Fails with `Unsupported` where the file
/// system can't.
pub fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return allocate(
        file,
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    );
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(target_os = "linux")]
fn allocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = libc::off_t::try_from(offset).map_err(invalid)?;
    let len = libc::off_t::try_from(len).map_err(invalid)?;
    loop {
        // SAFETY: takes no pointers.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
