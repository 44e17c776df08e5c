//! Serves a disk's queue: through a ring if there is one, or one request after the other.

use std::io;

use super::BUDGET;
use super::flights::Flights;
use super::requests::Requests;
use crate::devices::virtio::queue::ServeError;
use crate::devices::virtio::{ActiveQueue, Faults, Interrupt, Position};
use crate::sys::reactor::{self, Control, Interest, Readiness};
use crate::sys::ring::Ring;

const QUEUE: usize = 0;
const RING: usize = 1;

#[derive(Debug)]
pub(super) struct Worker {
    // Before the chains that are under way: those go with their queue.
    queue: ActiveQueue,
    requests: Requests,
    flights: Option<Flights>,
    interrupt: Interrupt,
    faults: Faults,
}

impl Worker {
    pub(super) fn new(
        queue: ActiveQueue,
        requests: Requests,
        ring: Option<Ring>,
        interrupt: Interrupt,
        faults: Faults,
    ) -> Self {
        Self {
            queue,
            requests,
            flights: ring.map(Flights::new),
            interrupt,
            faults,
        }
    }

    /// Waits for what is under way, on the thread whose work that is.
    pub(super) fn drain(&mut self) {
        let Some(flights) = &mut self.flights else {
            return;
        };
        if let Err(error) = flights.drain(&mut self.queue, &mut self.requests, &self.interrupt) {
            tracing::debug!(%error, "Disk requests under way were not answered");
        }
    }

    /// How far the queue is. Nothing is under way.
    pub(super) fn position(&self) -> (u16, Position) {
        self.queue.position(0)
    }

    /// What the disk has, to be changed while the worker is held still.
    pub(super) fn requests_mut(&mut self) -> &mut Requests {
        &mut self.requests
    }

    /// What the next worker needs again.
    pub(super) fn into_parts(self) -> (Requests, Option<Ring>) {
        (self.requests, self.flights.map(|flights| flights.ring))
    }

    fn act(&mut self, token: usize) -> Result<(), ServeError> {
        let Self {
            queue,
            requests,
            flights,
            interrupt,
            ..
        } = self;
        match flights {
            None => queue.serve(interrupt, BUDGET, |chain| requests.serve(chain)),
            Some(flights) if token == QUEUE => flights.serve(queue, requests, interrupt),
            Some(flights) => flights.reap(queue, requests, interrupt),
        }
    }
}

impl reactor::Worker for Worker {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        control.listen(&self.queue.doorbell, QUEUE)?;
        if let Some(flights) = &self.flights {
            control.add(flights.ring.bell(), RING, Interest::READ)?;
        }
        // A driver may have made requests before DRIVER_OK.
        self.queue.doorbell.ring()
    }

    fn ready(&mut self, control: &mut Control<'_>, token: usize, _readiness: Readiness) {
        if let Err(fault) = self.act(token) {
            control.remove(QUEUE);
            control.remove(RING);
            // The kernel must be done with guest memory before the driver hears of the fault.
            if let Some(flights) = &mut self.flights
                && let Err(error) = flights.ring.settle()
            {
                tracing::error!(%error, "Disk I/O can't be waited for");
            }
            self.faults.needs_reset(&fault);
        }
    }
}
