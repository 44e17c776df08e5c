//! Sequential access to a chain's buffers, whatever way the driver cut them.

use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice,
};

use super::Segment;
use crate::memory::GuestMemory;

/// A chain has not what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CursorError {
    /// The buffers end too early.
    #[error("Chain has {left} bytes left, {wanted} needed")]
    Short {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left.
        left: u64,
    },
    /// Guest memory can't be accessed.
    #[error("Cannot access a buffer of the chain")]
    Memory(#[from] GuestMemoryError),
}

/// A position within buffers.
#[derive(Clone, Debug)]
struct Cursor<'a> {
    memory: &'a GuestMemory,
    /// The buffer the position is in, and those behind it.
    segments: &'a [Segment],
    /// Bytes of the first segment already passed.
    offset: u32,
    remaining: u64,
    passed: u64,
}

impl<'a> Cursor<'a> {
    fn check(&self, wanted: u64) -> Result<(), CursorError> {
        if wanted > self.remaining {
            return Err(CursorError::Short {
                wanted,
                left: self.remaining,
            });
        }
        Ok(())
    }

    /// The next contiguous piece, at most `limit` bytes; `None` at the end or for a limit of 0.
    fn piece(&self, limit: u64) -> Option<(GuestAddress, u32)> {
        let segment = self.segments.first()?;
        let left = segment.len.checked_sub(self.offset)?;
        let len = u32::try_from(limit.min(u64::from(left))).ok()?;
        let addr = segment.addr.checked_add(u64::from(self.offset))?;
        (len > 0).then_some((addr, len))
    }

    /// Moves on by `len` bytes, which are within the first segment.
    fn pass(&mut self, len: u32) {
        self.remaining = self.remaining.saturating_sub(u64::from(len));
        self.passed = self.passed.saturating_add(u64::from(len));
        self.offset = self.offset.saturating_add(len);
        if let Some((first, rest)) = self.segments.split_first()
            && self.offset >= first.len
        {
            self.segments = rest;
            self.offset = 0;
        }
    }

    fn skip(&mut self, count: u64) -> Result<(), CursorError> {
        self.check(count)?;
        let mut left = count;
        while let Some((_, len)) = self.piece(left) {
            self.pass(len);
            left = left.saturating_sub(u64::from(len));
        }
        Ok(())
    }

    /// Host memory of the next `limit` bytes or what is left of them, in order.
    fn slices(&self, limit: u64) -> Result<Vec<VolatileSlice<'a>>, CursorError> {
        let mut cursor = self.clone();
        let mut left = limit;
        let mut slices = Vec::with_capacity(self.segments.len());
        while let Some((addr, len)) = cursor.piece(left) {
            for slice in GuestMemoryBackend::get_slices(self.memory, addr, len as usize) {
                slices.push(slice?);
            }
            cursor.pass(len);
            left = left.saturating_sub(u64::from(len));
        }
        Ok(slices)
    }

    /// Calls `f` with pieces that make up `total` bytes and the part of a buffer each stands for.
    fn each(
        &mut self,
        total: usize,
        mut f: impl FnMut(&GuestMemory, GuestAddress, usize, usize) -> Result<(), GuestMemoryError>,
    ) -> Result<(), CursorError> {
        self.check(total as u64)?;
        let mut done: usize = 0;
        while let Some((addr, len)) = self.piece(total.saturating_sub(done) as u64) {
            let end = done.saturating_add(len as usize);
            f(self.memory, addr, done, end)?;
            self.pass(len);
            done = end;
        }
        Ok(())
    }
}

/// Reads a chain's readable buffers in order.
#[derive(Clone, Debug)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    pub(super) fn new(memory: &'a GuestMemory, segments: &'a [Segment], len: u64) -> Self {
        Self(Cursor {
            memory,
            segments,
            offset: 0,
            remaining: len,
            passed: 0,
        })
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> u64 {
        self.0.remaining
    }

    /// Bytes read or skipped.
    pub fn position(&self) -> u64 {
        self.0.passed
    }

    /// Fills `data`. When the chain is too short nothing is read.
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<(), CursorError> {
        self.0.each(data.len(), |memory, addr, from, to| {
            match data.get_mut(from..to) {
                Some(part) => memory.read_slice(part, addr),
                None => Ok(()),
            }
        })
    }

    /// Reads a value as it lies in memory; fields are little-endian by their types.
    pub fn read_obj<T: ByteValued>(&mut self) -> Result<T, CursorError> {
        let mut value = T::zeroed();
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    /// Passes over `count` bytes.
    pub fn skip(&mut self, count: u64) -> Result<(), CursorError> {
        self.0.skip(count)
    }

    /// Host memory of the next `limit` bytes, or fewer at the end: for system calls that read from
    /// it. The position stays; [`Reader::skip`] what was used.
    pub fn slices(&self, limit: u64) -> Result<Vec<VolatileSlice<'a>>, CursorError> {
        self.0.slices(limit)
    }
}

/// Writes a chain's writable buffers in order.
#[derive(Clone, Debug)]
pub struct Writer<'a>(Cursor<'a>);

impl<'a> Writer<'a> {
    pub(super) fn new(memory: &'a GuestMemory, segments: &'a [Segment], len: u64) -> Self {
        Self(Cursor {
            memory,
            segments,
            offset: 0,
            remaining: len,
            passed: 0,
        })
    }

    /// Bytes that can still be written.
    pub fn remaining(&self) -> u64 {
        self.0.remaining
    }

    /// Bytes written or skipped: what [`Virtqueue::complete`](super::Virtqueue::complete) wants to
    /// know when nothing was skipped unwritten.
    pub fn position(&self) -> u64 {
        self.0.passed
    }

    /// Writes all of `data`. When the chain is too short nothing is written.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), CursorError> {
        self.0.each(data.len(), |memory, addr, from, to| {
            match data.get(from..to) {
                Some(part) => memory.write_slice(part, addr),
                None => Ok(()),
            }
        })
    }

    /// Writes a value as it lies in memory; fields are little-endian by their types.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> Result<(), CursorError> {
        self.write_all(value.as_slice())
    }

    /// Passes over `count` bytes.
    pub fn skip(&mut self, count: u64) -> Result<(), CursorError> {
        self.0.skip(count)
    }

    /// Host memory of the next `limit` bytes, or fewer at the end: for system calls that write into
    /// it. The position stays; [`Writer::skip`] what was written.
    pub fn slices(&self, limit: u64) -> Result<Vec<VolatileSlice<'a>>, CursorError> {
        self.0.slices(limit)
    }
}
