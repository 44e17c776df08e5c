//! Several files, one after the other, as one disk that is only read.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use vm_memory::{Bytes, VolatileSlice};

use super::{Backend, Part};
use crate::sys::storage;

/// Where each file starts: a multiple of this. What is between two of them reads as zeroes.
pub const ALIGNMENT: u64 = 4096;

/// A [`Backend`] over several files, in order.
#[derive(Debug)]
pub struct Concat {
    parts: Vec<Part>,
    size: u64,
}

impl Concat {
    /// Takes over `files`, which are open for reading.
    ///
    /// # Errors
    /// One of them has no size, such as a directory, or all together are larger than a disk can be.
    pub fn open(files: Vec<File>) -> io::Result<Self> {
        let mut parts = Vec::with_capacity(files.len());
        let mut size = 0_u64;
        for file in files {
            let len = storage::size(&file)?;
            let start = size;
            size = size
                .checked_add(len)
                .and_then(|end| end.checked_next_multiple_of(ALIGNMENT))
                .ok_or(io::ErrorKind::FileTooLarge)?;
            parts.push(Part { file, start, len });
        }
        Ok(Self { parts, size })
    }
}

impl Backend for Concat {
    fn size(&self) -> u64 {
        self.size
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn read(&mut self, mut offset: u64, into: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        // An empty one may lie behind the end.
        let mut into: VecDeque<_> = into.into_iter().filter(|slice| !slice.is_empty()).collect();
        while !into.is_empty() {
            // Files before this one end at `offset` or have only padding left.
            let next = self.parts.partition_point(|part| part.start <= offset);
            let limit = self.parts.get(next).map_or(self.size, |part| part.start);
            let here = next.checked_sub(1).and_then(|at| self.parts.get(at));
            match here.filter(|part| offset < part.start + part.len) {
                Some(part) => {
                    let (piece, moved) = take(&mut into, (part.start + part.len) - offset)?;
                    storage::read_exact_at(&part.file, offset - part.start, piece)?;
                    offset += moved;
                }
                None if offset < limit => {
                    let (piece, moved) = take(&mut into, limit - offset)?;
                    clear(&piece)?;
                    offset += moved;
                }
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(())
    }

    fn write(&mut self, _offset: u64, _from: Vec<VolatileSlice<'_>>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn write_zeroes(&mut self, _offset: u64, _len: u64, _may_unmap: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

/// Takes at most `most` bytes from the front, and says how many they are.
fn take<'a>(
    slices: &mut VecDeque<VolatileSlice<'a>>,
    most: u64,
) -> io::Result<(Vec<VolatileSlice<'a>>, u64)> {
    let (mut taken, mut left) = (Vec::new(), most);
    while left > 0 {
        let Some(slice) = slices.pop_front() else {
            break;
        };
        let part = usize::try_from(left).map_or(slice.len(), |left| left.min(slice.len()));
        let (here, rest) = slice.split_at(part).map_err(io::Error::other)?;
        if !rest.is_empty() {
            slices.push_front(rest);
        }
        left -= part as u64;
        taken.push(here);
    }
    Ok((taken, most - left))
}

fn clear(slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    static ZEROES: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];
    for slice in slices {
        let mut done = 0;
        while done < slice.len() {
            let more = (slice.len() - done).min(ZEROES.len());
            slice
                .write_slice(&ZEROES[..more], done)
                .map_err(io::Error::other)?;
            done += more;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
