//! Scatter and gather between a descriptor and guest memory, without a copy in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most slices one call takes; what follows them waits for the next call. Linux allows 1,024
/// (`UIO_MAXIOV`), but a batch of that size only delays the first byte.
pub const MAX_SLICES: usize = 64;

/// Writes the slices in order, as `writev` does, and returns how many bytes were taken.
///
/// # Errors
/// What the system call answered; an interrupted one is repeated.
pub fn write_from<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let slices = slices.get(..MAX_SLICES).unwrap_or(slices);
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let vector: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    repeat(|| {
        // SAFETY: every entry is a slice of guest memory that `guards` keeps mapped during the call;
        // the kernel only reads it, and copes with a guest that writes meanwhile.
        unsafe { libc::writev(fd.as_raw_fd(), vector.as_ptr(), count(&vector)) }
    })
}

/// Fills the slices in order, as `readv` does, and returns how many bytes came; 0 is the end.
///
/// # Errors
/// What the system call answered; an interrupted one is repeated.
pub fn read_into<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let slices = slices.get(..MAX_SLICES).unwrap_or(slices);
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vector: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let read = repeat(|| {
        // SAFETY: every entry is a slice of guest memory that `guards` keeps mapped during the call;
        // nothing in this process holds a Rust reference into guest memory.
        unsafe { libc::readv(fd.as_raw_fd(), vector.as_ptr(), count(&vector)) }
    })?;
    let mut left = read;
    for slice in slices {
        let here = left.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        left -= here;
    }
    Ok(read)
}

fn count(vector: &[libc::iovec]) -> libc::c_int {
    // At most MAX_SLICES.
    vector.len() as libc::c_int
}

fn repeat(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn bytes_pass_in_order_both_ways() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (mut a, mut b) = (*b"abc", *b"defgh");
        let slices = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
        ];
        assert_eq!(write_from(writer.as_fd(), &slices).unwrap(), 8);
        let mut seen = [0; 8];
        reader.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"abcdefgh");

        (&writer).write_all(b"12345").unwrap();
        assert_eq!(read_into(reader.as_fd(), &slices).unwrap(), 5);
        drop(writer);
        assert_eq!(read_into(reader.as_fd(), &slices).unwrap(), 0);
        assert_eq!((&a, &b[..2]), (b"123", &b"45"[..]));
    }
}
