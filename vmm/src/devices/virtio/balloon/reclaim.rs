//! What the driver names, given back to the host or taken from it.

use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;

use super::handle::Shared;
use super::pages::{PageSet, Refused, merge};
use super::wire::{MAX_PFNS, PFN_LEN, pfns};
use super::{Host, Metrics, PAGE};
use crate::devices::virtio::queue::{Chain, CursorError};
use crate::memory::GuestMemory;

/// The most bytes of one chain of free pages that are discarded; Linux reports up to 32 blocks of
/// 4 MiB.
const MAX_FREE: u64 = 256 << 20;

#[derive(Debug)]
pub(super) struct Pages {
    pub(super) inside: PageSet,
    host: Host,
    may_discard: bool,
    /// Whether the driver has something to say about what is in free pages.
    poisons: bool,
}

impl Pages {
    pub(super) fn new(memory: &GuestMemory, host: Host, may_discard: bool, poisons: bool) -> Self {
        Self {
            inside: PageSet::new(memory, host.page),
            host,
            may_discard,
            poisons,
        }
    }

    pub(super) fn inflate(&mut self, chain: &Chain, metrics: &Metrics) {
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

    pub(super) fn deflate(&mut self, chain: &Chain, metrics: &Metrics) {
        for pfn in pfns(&page_list(chain, metrics)) {
            match self.inside.remove(pfn) {
                Ok(()) => metrics.deflated_pages.add(1),
                Err(Refused::NotRam) => metrics.not_ram.add(1),
                Err(Refused::Unchanged) => metrics.not_inflated.add(1),
            }
        }
    }

    /// Discards what the guest reports as free (virtio 1.2, 5.5.6.7). The pages may be used again
    /// when the chain is returned, so not before.
    pub(super) fn report(&self, chain: &Chain, shared: &Shared) {
        let metrics = &shared.metrics;
        if chain.readable_len() > 0 {
            metrics.wrong_direction.add(1);
        }
        metrics
            .reported_bytes
            .add(chain.writable_len().min(MAX_FREE));
        self.free(chain, shared);
    }

    /// Takes a command id, or pages that are free while the host asks for those
    /// (virtio 1.2, 5.5.6.6).
    pub(super) fn hint(&self, chain: &Chain, shared: &Shared) {
        let metrics = &shared.metrics;
        if chain.readable_len() > 0 {
            match read(chain, PFN_LEN).ok().and_then(|id| id.try_into().ok()) {
                Some(id) => shared.hints.heard(u32::from_le_bytes(id)),
                None => metrics.remainders.add(1),
            }
        }
        if chain.writable_len() == 0 {
            return;
        }
        let taken = shared.hints.take(|| {
            metrics.hinted_bytes.add(chain.writable_len().min(MAX_FREE));
            self.free(chain, shared)
        });
        if !taken {
            metrics.stale_hints.add(1);
        }
    }

    /// Discards the writable buffers of a chain, as far as one turn goes; answers with how many
    /// bytes that were.
    fn free(&self, chain: &Chain, shared: &Shared) -> u64 {
        let metrics = &shared.metrics;
        if chain.writable_len() > MAX_FREE {
            metrics.oversized.add(1);
        }
        // A driver that fills free pages wants to find them so (5.5.6.5); discarded, they are 0.
        if self.poisons && shared.poison.load(Ordering::SeqCst) != 0 {
            metrics.poisoned.add(1);
            return 0;
        }
        let mut left = MAX_FREE;
        let mut discarded = 0;
        for segment in chain.writable() {
            let len = u64::from(segment.len).min(left);
            left -= len;
            // Whole pages of the host only. In RAM, so nothing overflows.
            let (start, end) = (segment.addr.0, segment.addr.0 + len);
            let first = start.next_multiple_of(self.host.page);
            let behind = end - end % self.host.page;
            if first != start || behind != end {
                metrics.remainders.add(1);
            }
            if first < behind && self.discard(first, behind - first, metrics) {
                discarded += behind - first;
            }
        }
        discarded
    }

    /// Answers whether the host did it.
    fn discard(&self, start: u64, len: u64, metrics: &Metrics) -> bool {
        metrics.discards.add(1);
        match self.host.discard.discard(GuestAddress(start), len) {
            Ok(()) => metrics.discarded_bytes.add(len),
            // The guest keeps its word all the same; only the host gains nothing.
            Err(error) => {
                metrics.discard_failures.add(1);
                tracing::debug!(%error, "Guest memory was not discarded");
                return false;
            }
        }
        true
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

/// The readable bytes of a chain, at most `limit`.
pub(super) fn read(chain: &Chain, limit: usize) -> Result<Vec<u8>, CursorError> {
    let len = usize::try_from(chain.readable_len())
        .unwrap_or(limit)
        .min(limit);
    let mut bytes = vec![0; len];
    chain.reader().read_exact(&mut bytes)?;
    Ok(bytes)
}
