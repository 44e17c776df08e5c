//! What a request asks for: understood, done at once, answered.

use std::io;
use std::sync::Arc;

use super::wire::{self, Disk, HEADER_LEN, ID_LEN, RANGE_LEN, Request, Status};
use super::{Backend, Metrics};
use crate::devices::virtio::queue::{Chain, CursorError, Reader};

/// A disk's contents and what is known of it.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) backend: Box<dyn Backend>,
    pub(super) disk: Disk,
    pub(super) serial: [u8; ID_LEN],
    /// Whether every write is made durable before it is answered.
    pub(super) write_through: bool,
    pub(super) metrics: Arc<Metrics>,
}

/// Why a request was not done.
#[derive(Debug)]
pub(super) enum Refusal {
    /// There is no room for an answer.
    Unanswerable,
    Status(Status),
    Io(io::Error),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<CursorError> for Refusal {
    fn from(_: CursorError) -> Self {
        // Lengths were checked by the parser: this request doesn't fit its own header.
        Self::Status(Status::IoError)
    }
}

/// The bytes of data behind a request's header.
pub(super) fn data(chain: &Chain) -> Result<Reader<'_>, CursorError> {
    let mut reader = chain.reader();
    reader.skip(HEADER_LEN as u64)?;
    Ok(reader)
}

impl Requests {
    /// What a chain asks for.
    pub(super) fn parse(&self, chain: &Chain) -> Result<Request, Refusal> {
        let room = chain.writable_len().checked_sub(1);
        let room = room.ok_or(Refusal::Unanswerable)?;
        let mut reader = chain.reader();
        let header: [u8; HEADER_LEN] = reader.read_obj()?;
        Ok(wire::parse(self.disk, header, reader.remaining(), room)?)
    }

    /// Does what a chain asks for, and answers it.
    pub(super) fn serve(&mut self, chain: &Chain) -> u32 {
        let done = self
            .parse(chain)
            .and_then(|request| self.perform(chain, request));
        self.answer(chain, done)
    }

    /// Does a request to its end.
    pub(super) fn perform(&mut self, chain: &Chain, request: Request) -> Result<(), Refusal> {
        match request {
            Request::Read { offset, len } => {
                self.backend.read(offset, chain.writer().slices(len)?)?;
            }
            Request::Write { offset, len } => {
                self.backend.write(offset, data(chain)?.slices(len)?)?;
                self.written()?;
            }
            Request::Flush if self.disk.read_only => {}
            Request::Flush => self.backend.flush()?,
            Request::GetId => chain.writer().write_all(&self.serial)?,
            Request::Discard { ranges } => self.clear(data(chain)?, ranges, false)?,
            Request::WriteZeroes { ranges } => self.clear(data(chain)?, ranges, true)?,
        }
        self.count(request);
        Ok(())
    }

    /// Counts a request that was done.
    pub(super) fn count(&self, request: Request) {
        let metrics = &self.metrics;
        match request {
            Request::Read { len, .. } => {
                metrics.reads.add(1);
                metrics.read_bytes.add(len);
            }
            Request::Write { len, .. } => {
                metrics.writes.add(1);
                metrics.written_bytes.add(len);
            }
            Request::Flush => metrics.flushes.add(1),
            Request::GetId | Request::Discard { .. } | Request::WriteZeroes { .. } => {}
        }
    }

    /// Writes a request's status, the last writable byte (virtio 1.2, 5.2.6). Returns the bytes
    /// written: with a read that failed, all the same, since a driver may not look at a status that
    /// lies beyond them.
    pub(super) fn answer(&self, chain: &Chain, done: Result<(), Refusal>) -> u32 {
        let status = match done {
            Ok(()) => Status::Ok,
            Err(Refusal::Unanswerable) => {
                self.metrics.unanswerable.add(1);
                return 0;
            }
            Err(Refusal::Status(status)) => status,
            Err(Refusal::Io(error)) => {
                tracing::debug!(%error, "Disk I/O failed");
                Status::IoError
            }
        };
        match status {
            Status::Ok => {}
            Status::IoError => self.metrics.io_errors.add(1),
            Status::Unsupported => self.metrics.unsupported.add(1),
        }
        let mut writer = chain.writer();
        if writer
            .skip(chain.writable_len().saturating_sub(1))
            .and_then(|()| writer.write_obj(status as u8))
            .is_err()
        {
            // Not to be had: the chain was checked to have that byte, in RAM.
            self.metrics.unanswerable.add(1);
            return 0;
        }
        u32::try_from(chain.writable_len()).unwrap_or(u32::MAX)
    }

    /// Discards or zeroes ranges; all are checked before the first is touched.
    fn clear(&mut self, mut reader: Reader<'_>, count: u32, zeroes: bool) -> Result<(), Refusal> {
        let ranges = (0..count)
            .map(|_| {
                let range: [u8; RANGE_LEN] = reader.read_obj()?;
                Ok(wire::parse_range(self.disk, range, zeroes)?)
            })
            .collect::<Result<Vec<_>, Refusal>>()?;
        for range in ranges.into_iter().filter(|range| range.len > 0) {
            if zeroes {
                self.backend
                    .write_zeroes(range.offset, range.len, range.unmap)?;
            } else {
                self.backend.discard(range.offset, range.len)?;
            }
            self.metrics.cleared_bytes.add(range.len);
        }
        self.written()
    }

    fn written(&mut self) -> Result<(), Refusal> {
        if self.write_through {
            self.backend.flush()?;
        }
        Ok(())
    }
}
