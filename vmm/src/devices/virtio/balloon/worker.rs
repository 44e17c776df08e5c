//! Serves a balloon's queues.

use std::io;
use std::sync::Arc;

use super::handle::Shared;
use super::reclaim::{Pages, read};
use super::wire::{MAX_STATS, STAT_LEN, Stats};
use crate::devices::virtio::queue::{Chain, ServeError};
use crate::devices::virtio::{Activation, ActiveQueue, Faults, Interrupt, Positions};
use crate::sys::reactor::{self, Control, Interest, Readiness};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
const HINTS: usize = 4;
/// The host asks for statistics.
const REQUEST: usize = 5;

/// Chains for each notification, so that other devices of the reactor have their turn.
const BUDGET: usize = 4;

/// The queues that were negotiated.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) inflate: Option<ActiveQueue>,
    pub(super) deflate: Option<ActiveQueue>,
    pub(super) stats: Option<ActiveQueue>,
    pub(super) hints: Option<ActiveQueue>,
    pub(super) reporting: Option<ActiveQueue>,
}

#[derive(Debug)]
pub(super) struct Worker {
    queues: Queues,
    /// The driver's buffer for statistics, kept until new ones are wanted (virtio 1.2, 5.5.6.3).
    held: Option<Chain>,
    pages: Pages,
    interrupt: Interrupt,
    faults: Faults,
    shared: Arc<Shared>,
}

impl Worker {
    pub(super) fn new(
        activation: Activation,
        queues: Queues,
        pages: Pages,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            queues,
            held: None,
            pages,
            interrupt: activation.interrupt,
            faults: activation.faults,
            shared,
        }
    }

    /// How far the queues are, and the pages in the balloon.
    pub(super) fn save(&self) -> (Positions, Vec<(u64, u64)>) {
        let held = |token| usize::from(token == STATS && self.held.is_some());
        let queues = self.queues().into_iter();
        let positions = queues.filter_map(|(token, queue)| Some(queue?.position(held(token))));
        (positions.collect(), self.pages.inside.runs())
    }

    /// Has in the balloon what was there when it was saved; it was discarded then.
    pub(super) fn put_in(&mut self, runs: &[(u64, u64)]) {
        self.pages.inside.insert_runs(runs);
    }

    fn queues(&self) -> [(usize, Option<&ActiveQueue>); 5] {
        let Queues {
            inflate,
            deflate,
            stats,
            hints,
            reporting,
        } = &self.queues;
        [
            (INFLATE, inflate.as_ref()),
            (DEFLATE, deflate.as_ref()),
            (STATS, stats.as_ref()),
            (HINTS, hints.as_ref()),
            (REPORTING, reporting.as_ref()),
        ]
    }

    fn serve(&mut self, token: usize) -> Result<(), ServeError> {
        let Self {
            queues,
            pages,
            interrupt,
            shared,
            ..
        } = self;
        let active = match token {
            INFLATE => &mut queues.inflate,
            DEFLATE => &mut queues.deflate,
            HINTS => &mut queues.hints,
            REPORTING => &mut queues.reporting,
            STATS => return self.take_stats(),
            _ => return self.request_stats(),
        };
        let Some(active) = active else { return Ok(()) };
        active.serve(interrupt, BUDGET, |chain| {
            match token {
                INFLATE => pages.inflate(chain, &shared.metrics),
                DEFLATE => pages.deflate(chain, &shared.metrics),
                HINTS => pages.hint(chain, shared),
                _ => pages.report(chain, shared),
            }
            // Nothing is ever written to the driver's buffers.
            0
        })
    }

    /// Reads what the driver says of its memory, and keeps the buffer.
    fn take_stats(&mut self) -> Result<(), ServeError> {
        let Some(active) = &mut self.queues.stats else {
            return Ok(());
        };
        let doorbell = |source| ServeError::Doorbell {
            queue: active.index,
            source,
        };
        active.doorbell.clear().map_err(doorbell)?;
        for _ in 0..BUDGET {
            let Some(chain) = active.queue.pop_or_notify()? else {
                return Ok(());
            };
            if chain.writable_len() > 0 {
                self.shared.metrics.wrong_direction.add(1);
            }
            if let Ok(bytes) = read(&chain, MAX_STATS * STAT_LEN) {
                self.shared.tell(Stats::parse(&bytes));
            }
            // One buffer is all a driver has (5.5.6.3): of several the newest stays.
            if let Some(older) = self.held.replace(chain) {
                active.queue.complete(older, 0)?;
                self.interrupt.used(&mut active.queue)?;
            }
        }
        active.doorbell.ring().map_err(doorbell)
    }

    /// Asks for fresh statistics by returning the buffer. Without one, the driver is about to
    /// bring it.
    fn request_stats(&mut self) -> Result<(), ServeError> {
        let Some(active) = &mut self.queues.stats else {
            return Ok(());
        };
        if let Some(chain) = self.held.take() {
            active.queue.complete(chain, 0)?;
            self.interrupt.used(&mut active.queue)?;
        }
        Ok(())
    }
}

impl reactor::Worker for Worker {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        for (token, queue) in self.queues() {
            if let Some(active) = queue {
                control.listen(&active.doorbell, token)?;
                // A driver may have put something there before DRIVER_OK.
                active.doorbell.ring()?;
            }
        }
        control.add(&self.shared.request, REQUEST, Interest::READ)
    }

    fn ready(&mut self, control: &mut Control<'_>, token: usize, _readiness: Readiness) {
        if token == REQUEST
            && let Err(error) = self.shared.request.clear()
        {
            tracing::error!(%error, "Balloon statistics cannot be requested any more");
            control.remove(REQUEST);
        }
        if let Err(fault) = self.serve(token) {
            for token in [INFLATE, DEFLATE, STATS, HINTS, REPORTING, REQUEST] {
                control.remove(token);
            }
            self.faults.needs_reset(&fault);
        }
    }
}
