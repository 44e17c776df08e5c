//! Several requests at once, through a ring of the kernel's.

use std::io;

use super::requests::{Refusal, Requests, data};
use super::wire::Request;
use super::{BUDGET, Part};
use crate::devices::virtio::queue::{Chain, ServeError};
use crate::devices::virtio::{ActiveQueue, Interrupt};
use crate::sys::ring::{Direction, Ring};

/// Requests that are under way.
#[derive(Debug)]
pub(super) struct Flights {
    pub(super) ring: Ring,
    /// By the tag the ring knows them by.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Flight {
    chain: Chain,
    request: Request,
    /// Operations that have not ended.
    left: usize,
    failed: Option<io::Error>,
    /// Whether what was written is being made durable.
    syncing: bool,
}

impl Flights {
    pub(super) fn new(ring: Ring) -> Self {
        Self {
            ring,
            flights: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Acts on a rung doorbell: begins what the driver asks for, within a budget.
    pub(super) fn serve(
        &mut self,
        active: &mut ActiveQueue,
        requests: &mut Requests,
        interrupt: &Interrupt,
    ) -> Result<(), ServeError> {
        let index = active.index;
        let doorbell = |source| ServeError::Doorbell {
            queue: index,
            source,
        };
        active.doorbell.clear().map_err(doorbell)?;
        let mut left = BUDGET;
        loop {
            active.queue.disable_notification()?;
            while left > 0
                && let Some(chain) = active.queue.pop()?
            {
                left -= 1;
                self.begin(chain, active, requests)?;
            }
            if left == 0 {
                active.doorbell.ring().map_err(doorbell)?;
                break;
            }
            if !active.queue.enable_notification()? {
                break;
            }
        }
        self.reap(active, requests, interrupt)
    }

    /// Answers what has ended, with one interrupt for all of it.
    pub(super) fn reap(
        &mut self,
        active: &mut ActiveQueue,
        requests: &mut Requests,
        interrupt: &Interrupt,
    ) -> Result<(), ServeError> {
        // First, so that what ends meanwhile rings anew.
        self.ring.bell().clear().map_err(ServeError::Host)?;
        loop {
            self.ring.submit().map_err(ServeError::Host)?;
            if !self.land(active, requests)? {
                break;
            }
        }
        interrupt.used(&mut active.queue)?;
        Ok(())
    }

    /// Waits for all that is under way, and answers it.
    pub(super) fn drain(
        &mut self,
        active: &mut ActiveQueue,
        requests: &mut Requests,
        interrupt: &Interrupt,
    ) -> Result<(), ServeError> {
        while self.ring.in_flight() > 0 {
            self.ring.wait().map_err(ServeError::Host)?;
            self.land(active, requests)?;
        }
        interrupt.used(&mut active.queue)?;
        Ok(())
    }

    /// Begins a request, or does it at once: alone, it needs one call instead of two.
    fn begin(
        &mut self,
        chain: Chain,
        active: &mut ActiveQueue,
        requests: &mut Requests,
    ) -> Result<(), ServeError> {
        let alone = self.ring.in_flight() == 0 && !active.queue.has_pending()?;
        let parsed = requests.parse(&chain);
        let left = match &parsed {
            Ok(request) if !alone => self.start(&chain, *request, requests),
            _ => Ok(0),
        };
        let done = match (parsed, left) {
            (Ok(request), Ok(0)) => requests.perform(&chain, request),
            (Ok(request), Ok(left)) => {
                self.remember(Flight {
                    chain,
                    request,
                    left,
                    failed: None,
                    syncing: false,
                });
                return Ok(());
            }
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
        };
        let written = requests.answer(&chain, done);
        active.queue.complete(chain, written)?;
        Ok(())
    }

    /// Starts the operations of a request and answers with how many; none for one that the ring has
    /// nothing for.
    fn start(
        &mut self,
        chain: &Chain,
        request: Request,
        requests: &Requests,
    ) -> Result<usize, Refusal> {
        let parts = requests.backend.parts();
        let tag = self.next_tag();
        let memory = chain.memory();
        match request {
            Request::Read { offset, len } => {
                let pieces = pieces(parts, offset, len);
                let mut writer = chain.writer();
                for (file, at, len) in &pieces {
                    let slices = writer.slices(*len)?;
                    self.ring
                        .transfer(tag, Direction::Read, (*file, *at), &slices, memory)?;
                    writer.skip(*len)?;
                }
                Ok(pieces.len())
            }
            Request::Write { offset, len } => {
                let pieces = pieces(parts, offset, len);
                let mut reader = data(chain)?;
                for (file, at, len) in &pieces {
                    let slices = reader.slices(*len)?;
                    self.ring
                        .transfer(tag, Direction::Write, (*file, *at), &slices, memory)?;
                    reader.skip(*len)?;
                }
                Ok(pieces.len())
            }
            Request::Flush if !requests.disk.read_only => Ok(self.sync(tag, parts)),
            _ => Ok(0),
        }
    }

    fn sync(&mut self, tag: u64, parts: &[Part]) -> usize {
        for file in 0..parts.len() {
            self.ring.sync(tag, file);
        }
        parts.len()
    }

    /// Answers what has ended; whether anything has.
    fn land(
        &mut self,
        active: &mut ActiveQueue,
        requests: &mut Requests,
    ) -> Result<bool, ServeError> {
        let mut any = false;
        while let Some(ended) = self.ring.ended() {
            any = true;
            let place = usize::try_from(ended.tag).unwrap_or(usize::MAX);
            let Some(flight) = self.flights.get_mut(place).and_then(Option::as_mut) else {
                continue;
            };
            flight.left = flight.left.saturating_sub(1);
            if let Err(error) = ended.result {
                flight.failed = Some(error);
            }
            if flight.left > 0 {
                continue;
            }
            let written = matches!(flight.request, Request::Write { .. });
            if written && requests.write_through && !flight.syncing && flight.failed.is_none() {
                flight.syncing = true;
                flight.left = requests.backend.parts().len();
                self.sync(ended.tag, requests.backend.parts());
                continue;
            }
            if let Some(flight) = self.flights.get_mut(place).and_then(Option::take) {
                self.free.push(place);
                let done = match flight.failed {
                    Some(error) => Err(Refusal::Io(error)),
                    None => {
                        requests.count(flight.request);
                        Ok(())
                    }
                };
                let written = requests.answer(&flight.chain, done);
                active.queue.complete(flight.chain, written)?;
            }
        }
        Ok(any)
    }

    fn next_tag(&mut self) -> u64 {
        if self.free.is_empty() {
            self.free.push(self.flights.len());
            self.flights.push(None);
        }
        self.free.last().map_or(0, |place| *place as u64)
    }

    /// Keeps a request under the tag that is next.
    fn remember(&mut self, flight: Flight) {
        if let Some(place) = self.free.pop()
            && let Some(slot) = self.flights.get_mut(place)
        {
            *slot = Some(flight);
        }
    }
}

/// Where in which files a range of the disk is; nothing when they don't have all of it.
fn pieces(parts: &[Part], offset: u64, len: u64) -> Vec<(usize, u64, u64)> {
    let end = offset.saturating_add(len);
    let mut pieces = Vec::new();
    let mut found = 0;
    for (index, part) in parts.iter().enumerate() {
        let from = offset.max(part.start);
        let to = end.min(part.start.saturating_add(part.len));
        if from < to {
            pieces.push((index, from - part.start, to - from));
            found += to - from;
        }
    }
    if found != len {
        pieces.clear();
    }
    pieces
}
