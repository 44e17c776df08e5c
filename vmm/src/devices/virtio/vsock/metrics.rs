//! What a vsock device counted.

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

/// Counters of one device, over all its connections.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Connections made by host programs.
    pub accepted: Counter,
    /// Greetings that were not `CONNECT <port>`.
    pub bad_greetings: Counter,
    /// Connections the guest accepted.
    pub established: Counter,
    /// Connections the guest refused.
    pub refused: Counter,
    /// Bytes from host to guest.
    pub host_bytes: Counter,
    /// Bytes from guest to host.
    pub guest_bytes: Counter,
    /// Packets to the guest.
    pub packets_sent: Counter,
    /// Packets from the guest.
    pub packets_received: Counter,
    /// Packets from the guest that were malformed, or not for a connection there is.
    pub packets_refused: Counter,
    /// Connections reset because the guest broke their rules.
    pub violations: Counter,
    /// Resets sent.
    pub resets_sent: Counter,
    /// Receive buffers too small for a header, or for a byte of data when there was some.
    pub bad_buffers: Counter,
}
