//! Serves a disk's queue, one request after the other.

use std::io;
use std::sync::Arc;

use super::wire::{self, Disk, HEADER_LEN, ID_LEN, RANGE_LEN, Request, Status};
use super::{Backend, Metrics};
use crate::devices::virtio::queue::{Chain, CursorError, Reader};
use crate::devices::virtio::{ActiveQueue, Faults, Interrupt};
use crate::sys::reactor::{self, Control, Interest, Readiness};

/// Requests for each notification, before a call to the worker gets its turn.
const BUDGET: usize = 64;
const QUEUE: usize = 0;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) queue: ActiveQueue,
    pub(super) backend: Box<dyn Backend>,
    pub(super) disk: Disk,
    pub(super) serial: [u8; ID_LEN],
    pub(super) write_through: bool,
    pub(super) metrics: Arc<Metrics>,
    pub(super) interrupt: Interrupt,
    pub(super) faults: Faults,
}

impl reactor::Worker for Worker {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        control.add(&self.queue.doorbell, QUEUE, Interest::READ)?;
        // A driver may have made requests before DRIVER_OK.
        self.queue.doorbell.ring()
    }

    fn ready(&mut self, control: &mut Control<'_>, _token: usize, _readiness: Readiness) {
        let Self {
            queue,
            backend,
            disk,
            serial,
            write_through,
            metrics,
            interrupt,
            faults,
        } = self;
        let mut requests = Requests {
            backend: &mut **backend,
            disk: *disk,
            serial: *serial,
            write_through: *write_through,
            metrics,
        };
        if let Err(fault) = queue.serve(interrupt, BUDGET, |chain| requests.answer(chain)) {
            control.remove(QUEUE);
            faults.needs_reset(&fault);
        }
    }
}

struct Requests<'a> {
    backend: &'a mut dyn Backend,
    disk: Disk,
    serial: [u8; ID_LEN],
    write_through: bool,
    metrics: &'a Metrics,
}

/// Why a request was answered with an error.
enum Refusal {
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

impl Requests<'_> {
    /// Does what a request asks for and writes its status, the last writable byte
    /// (virtio 1.2, 5.2.6). Returns the bytes written: with a read that failed, all the same, since
    /// a driver may not look at a status that lies beyond them.
    fn answer(&mut self, chain: &Chain) -> u32 {
        let Some(room) = chain.writable_len().checked_sub(1) else {
            self.metrics.unanswerable.add(1);
            return 0;
        };
        let status = match self.perform(chain, room) {
            Ok(()) => Status::Ok,
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
            .skip(room)
            .and_then(|()| writer.write_obj(status as u8))
            .is_err()
        {
            // Not to be had: the chain was checked to have that byte, in RAM.
            self.metrics.unanswerable.add(1);
            return 0;
        }
        u32::try_from(chain.writable_len()).unwrap_or(u32::MAX)
    }

    fn perform(&mut self, chain: &Chain, room: u64) -> Result<(), Refusal> {
        let mut reader = chain.reader();
        let header: [u8; HEADER_LEN] = reader.read_obj()?;
        let metrics = self.metrics;
        match wire::parse(self.disk, header, reader.remaining(), room)? {
            Request::Read { offset, len } => {
                self.backend.read(offset, chain.writer().slices(len)?)?;
                metrics.reads.add(1);
                metrics.read_bytes.add(len);
            }
            Request::Write { offset, len } => {
                self.backend.write(offset, reader.slices(len)?)?;
                self.written()?;
                metrics.writes.add(1);
                metrics.written_bytes.add(len);
            }
            Request::Flush => {
                if !self.disk.read_only {
                    self.backend.flush()?;
                }
                metrics.flushes.add(1);
            }
            Request::GetId => chain.writer().write_all(&self.serial)?,
            Request::Discard { ranges } => self.clear(reader, ranges, false)?,
            Request::WriteZeroes { ranges } => self.clear(reader, ranges, true)?,
        }
        Ok(())
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
