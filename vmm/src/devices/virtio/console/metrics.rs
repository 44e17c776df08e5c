//! What a console counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one console, over all its ports.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes from the guest that reached an output.
    pub output_bytes: Counter,
    /// Bytes from the guest that nobody took: no output attached, or its reader had gone.
    pub discarded_bytes: Counter,
    /// Bytes from an input that reached the guest.
    pub input_bytes: Counter,
    /// Times an output was full and its port had to wait.
    pub output_stalls: Counter,
    /// Outputs that failed; the port's output is discarded from there on.
    pub output_failures: Counter,
    /// Control messages from the driver.
    pub control_received: Counter,
    /// Control messages to the driver.
    pub control_sent: Counter,
    /// Control messages that were malformed, named no port or made no sense.
    pub control_refused: Counter,
    /// Buffers of the wrong direction or size, given back unused.
    pub bad_buffers: Counter,
}
