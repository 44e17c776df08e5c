//! What a disk counted.

use crate::devices::virtio::metrics::Counter;

/// Counters of one disk.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Read requests that succeeded.
    pub reads: Counter,
    /// Bytes they read.
    pub read_bytes: Counter,
    /// Write requests that succeeded.
    pub writes: Counter,
    /// Bytes they wrote.
    pub written_bytes: Counter,
    /// Flushes that succeeded.
    pub flushes: Counter,
    /// Bytes discarded or zeroed.
    pub cleared_bytes: Counter,
    /// Times the disk was empty and was filled.
    pub fills: Counter,
    /// Requests answered with an I/O error.
    pub io_errors: Counter,
    /// Requests answered as unsupported.
    pub unsupported: Counter,
    /// Requests with no room for an answer, given back without one.
    pub unanswerable: Counter,
}
