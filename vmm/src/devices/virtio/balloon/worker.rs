//! Serves a balloon's queues.

use std::io;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::handle::Shared;
use super::pages::{PageSet, Refused, merge};
use super::wire::{MAX_PFNS, MAX_STATS, PFN_LEN, STAT_LEN, Stats, pfns};
use super::{Host, Metrics, PAGE};
use crate::devices::virtio::queue::{Chain, CursorError, ServeError};
use crate::devices::virtio::{Activation, ActiveQueue, Faults, Interrupt};
use crate::sys::reactor::{self, Control, Interest, Readiness};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
/// The host asks for statistics.
const REQUEST: usize = 4;

/// Chains for each notification, so that other devices of the reactor have their turn.
const BUDGET: usize = 4;
/// The most bytes of one report that are discarded; Linux reports up to 32 blocks of 4 MiB.
const MAX_REPORTED: u64 = 256 << 20;

/// The queues that were negotiated.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) inflate: Option<ActiveQueue>,
    pub(super) deflate: Option<ActiveQueue>,
    pub(super) stats: Option<ActiveQueue>,
    pub(super) reporting: Option<ActiveQueue>,
}

#[derive(Debug)]
pub(super) struct Worker {
    queues: Queues,
    /// The driver's buffer for statistics, kept until new ones are wanted (virtio 1.2, 5.5.6.3).
    held: Option<Chain>,
    balloon: Pages,
    interrupt: Interrupt,
    faults: Faults,
    shared: Arc<Shared>,
}

/// What pages go through.
#[derive(Debug)]
struct Pages {
    inside: PageSet,
    host: Host,
    may_discard: bool,
}

impl Worker {
    pub(super) fn new(
        activation: Activation,
        queues: Queues,
        host: Host,
        may_discard: bool,
        shared: Arc<Shared>,
    ) -> Self {
        let inside = PageSet::new(&activation.memory, host.page);
        Self {
            queues,
            held: None,
            balloon: Pages {
                inside,
                host,
                may_discard,
            },
            interrupt: activation.interrupt,
            faults: activation.faults,
            shared,
        }
    }

    fn queues(&self) -> [(usize, Option<&ActiveQueue>); 4] {
        let Queues {
            inflate,
            deflate,
            stats,
            reporting,
        } = &self.queues;
        [
            (INFLATE, inflate.as_ref()),
            (DEFLATE, deflate.as_ref()),
            (STATS, stats.as_ref()),
            (REPORTING, reporting.as_ref()),
        ]
    }

    fn serve(&mut self, token: usize) -> Result<(), ServeError> {
        let Self {
            queues,
            balloon,
            interrupt,
            shared,
            ..
        } = self;
        let metrics = &shared.metrics;
        // Nothing is ever written to the driver's buffers: used length 0 throughout.
        match (token, queues) {
            (
                INFLATE,
                Queues {
                    inflate: Some(queue),
                    ..
                },
            ) => queue.serve(interrupt, BUDGET, |chain| {
                balloon.inflate(chain, metrics);
                0
            }),
            (
                DEFLATE,
                Queues {
                    deflate: Some(queue),
                    ..
                },
            ) => queue.serve(interrupt, BUDGET, |chain| {
                balloon.deflate(chain, metrics);
                0
            }),
            (
                REPORTING,
                Queues {
                    reporting: Some(queue),
                    ..
                },
            ) => queue.serve(interrupt, BUDGET, |chain| {
                balloon.report(chain, metrics);
                0
            }),
            (STATS, _) => self.take_stats(),
            (REQUEST, _) => self.request_stats(),
            _ => Ok(()),
        }
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
            let Some(chain) = active.queue.pop()? else {
                if active.queue.enable_notification()? {
                    continue;
                }
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
                control.add(&active.doorbell, token, Interest::READ)?;
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
            for token in [INFLATE, DEFLATE, STATS, REPORTING, REQUEST] {
                control.remove(token);
            }
            self.faults.needs_reset(&fault);
        }
    }
}

impl Pages {
    fn inflate(&mut self, chain: &Chain, metrics: &Metrics) {
        let mut complete = Vec::new();
        for pfn in pfns(&page_list(chain, metrics)) {
            match self.inside.insert(pfn) {
                Ok(first) => {
                    metrics.inflated_pages.add(1);
                    complete.extend(first);
                }
                Err(Refused::NotRam) => metrics.not_ram.add(1),
                Err(Refused::Unchanged) => metrics.duplicates.add(1),
            }
        }
        if self.may_discard {
            for (first, pages) in merge(complete, self.host.page / PAGE) {
                self.discard(first * PAGE, pages * PAGE, metrics);
            }
        }
    }

    fn deflate(&mut self, chain: &Chain, metrics: &Metrics) {
        for pfn in pfns(&page_list(chain, metrics)) {
            match self.inside.remove(pfn) {
                Ok(()) => metrics.deflated_pages.add(1),
                Err(Refused::NotRam) => metrics.not_ram.add(1),
                Err(Refused::Unchanged) => metrics.not_inflated.add(1),
            }
        }
    }

    /// Discards what the guest reports as free (virtio 1.2, 5.5.6.7): the writable buffers of a
    /// chain. They may be used again when the chain is returned, so not before.
    fn report(&self, chain: &Chain, metrics: &Metrics) {
        if chain.readable_len() > 0 {
            metrics.wrong_direction.add(1);
        }
        if chain.writable_len() > MAX_REPORTED {
            metrics.oversized.add(1);
        }
        let mut left = MAX_REPORTED;
        for segment in chain.writable() {
            let len = u64::from(segment.len).min(left);
            left -= len;
            metrics.reported_bytes.add(len);
            // Whole pages of the host only. In RAM, so nothing overflows.
            let (start, end) = (segment.addr.0, segment.addr.0 + len);
            let first = start.next_multiple_of(self.host.page);
            let behind = end - end % self.host.page;
            if first != start || behind != end {
                metrics.remainders.add(1);
            }
            if first < behind {
                self.discard(first, behind - first, metrics);
            }
        }
    }

    fn discard(&self, start: u64, len: u64, metrics: &Metrics) {
        metrics.discards.add(1);
        match self.host.discard.discard(GuestAddress(start), len) {
            Ok(_) => metrics.discarded_bytes.add(len),
            // The guest keeps its word all the same; only the host gains nothing.
            Err(error) => {
                metrics.discard_failures.add(1);
                tracing::debug!(%error, "Guest memory was not discarded");
            }
        }
    }
}

/// The page list of a chain, as far as one turn goes.
fn page_list(chain: &Chain, metrics: &Metrics) -> Vec<u8> {
    if chain.writable_len() > 0 {
        metrics.wrong_direction.add(1);
    }
    if !chain.readable_len().is_multiple_of(PFN_LEN as u64) {
        metrics.remainders.add(1);
    }
    if chain.readable_len() > (MAX_PFNS * PFN_LEN) as u64 {
        metrics.oversized.add(1);
    }
    // The chain was checked to be in RAM: there is no error to be had.
    read(chain, MAX_PFNS * PFN_LEN).unwrap_or_default()
}

fn read(chain: &Chain, limit: usize) -> Result<Vec<u8>, CursorError> {
    let len = usize::try_from(chain.readable_len())
        .unwrap_or(limit)
        .min(limit);
    let mut bytes = vec![0; len];
    chain.reader().read_exact(&mut bytes)?;
    Ok(bytes)
}
