//! A disk in a raw file or on a block device.

use std::fs::File;
use std::io;

use vm_memory::VolatileSlice;

use super::{Backend, Part};
use crate::sys::storage;

/// Written where the file system can't zero a range by itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A [`Backend`] over a regular file or a block device.
#[derive(Debug)]
pub struct FileBackend {
    part: Part,
}

impl FileBackend {
    /// Takes over `file`, which is open for reading and, unless the disk is `read_only`, for
    /// writing. Its size now is the disk's from now on.
    ///
    /// # Errors
    /// What has no size, such as a directory or a terminal, and what can't be written but should.
    pub fn open(file: File, read_only: bool) -> io::Result<Self> {
        let size = storage::size(&file)?;
        if !read_only && !storage::is_writable(&file)? {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "File of a writable disk is not open for writing",
            ));
        }
        Ok(Self {
            part: Part {
                file,
                start: 0,
                len: size,
            },
        })
    }

    fn write_zeroes_out(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        while len > 0 {
            let here = len.min(ZEROES.len() as u64);
            self.part
                .file
                .write_all_at(&ZEROES[..here as usize], offset)?;
            offset += here;
            len -= here;
        }
        Ok(())
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

impl Backend for FileBackend {
    fn size(&self) -> u64 {
        self.part.len
    }

    fn parts(&self) -> &[Part] {
        std::slice::from_ref(&self.part)
    }

    fn read(&mut self, offset: u64, into: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        storage::read_exact_at(&self.part.file, offset, into)
    }

    fn write(&mut self, offset: u64, from: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        storage::write_all_at(&self.part.file, offset, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.part.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match storage::punch_hole(&self.part.file, offset, len) {
            // A discard is a hint (virtio 1.2, 5.2.6.2): not to follow it is allowed.
            Err(error) if is_unsupported(&error) => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let zeroed = if may_unmap {
            storage::punch_hole(&self.part.file, offset, len)
        } else {
            storage::zero_range(&self.part.file, offset, len)
        };
        match zeroed {
            Err(error) if is_unsupported(&error) => self.write_zeroes_out(offset, len),
            other => other,
        }
    }
}
