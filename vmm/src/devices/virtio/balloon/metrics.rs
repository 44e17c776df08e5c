//! What a balloon counted.

use crate::devices::virtio::metrics::Counter;

/// Counters of one balloon. Pages are of 4 KiB.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Pages put into the balloon.
    pub inflated_pages: Counter,
    /// Pages taken out.
    pub deflated_pages: Counter,
    /// Bytes reported as free.
    pub reported_bytes: Counter,
    /// Bytes hinted as free while that was asked for.
    pub hinted_bytes: Counter,
    /// Bytes given back to the host, inflated, reported or hinted.
    pub discarded_bytes: Counter,
    /// Times the host was asked to discard.
    pub discards: Counter,
    /// Times it refused.
    pub discard_failures: Counter,
    /// Pages named that are not guest RAM.
    pub not_ram: Counter,
    /// Pages inflated that were in the balloon.
    pub duplicates: Counter,
    /// Pages deflated that were not.
    pub not_inflated: Counter,
    /// Chains with bytes that make no whole page number, or reports that make no whole host page.
    pub remainders: Counter,
    /// Chains with buffers of the wrong direction, which were passed over.
    pub wrong_direction: Counter,
    /// Chains with more than one turn takes; what was over that was passed over.
    pub oversized: Counter,
    /// Chains with free pages that were kept, since the guest relies on what is in them.
    pub poisoned: Counter,
    /// Chains with hints that nobody asked for, or that came too late.
    pub stale_hints: Counter,
    /// Statistics received.
    pub stats_updates: Counter,
}
