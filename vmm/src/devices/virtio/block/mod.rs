//! virtio-block (virtio 1.2, 5.2): disks.
//!
//! Requests are parsed by [`wire`] before anything is done; data goes between guest memory and the
//! [`Backend`] without a copy. A request that makes no sense is answered with an error status and
//! the disk goes on; a queue that makes none stops the disk.

pub mod concat;
mod device;
mod file;
mod flights;
mod metrics;
mod requests;
mod state;
#[cfg(test)]
mod tests;
pub mod wire;
mod worker;

use std::fmt;
use std::fs::File;
use std::io;

use vm_memory::VolatileSlice;

use crate::devices::virtio::QuiesceError;
use crate::jail::{Filter, Rule, allow, calls};
use crate::sys::{reactor, threads};

pub use concat::Concat;
pub use device::Block;
pub use file::FileBackend;
pub use metrics::Metrics;
pub use state::BlockState;

/// The thread of a disk: reads and writes at offsets, and nothing with a name or an address.
pub(crate) const DISK: Filter = Filter {
    name: "disk",
    tables: &[threads::EVERY, reactor::WAITING, FILE],
};

/// Requests for each notification, before a call to the worker gets its turn.
const BUDGET: usize = 64;

/// What a file takes.
pub(crate) const FILE: &[Rule] = &[
    allow(calls::SYS_preadv),
    allow(calls::SYS_pwritev),
    allow(calls::SYS_pwrite64),
    allow(calls::SYS_fdatasync),
    allow(calls::SYS_fallocate),
    // A ring that was made, and restricted, before the VM ran.
    allow(calls::SYS_io_uring_enter),
];

/// Where a disk's bytes are. Positions and lengths are checked against [`Backend::size`] before.
pub trait Backend: fmt::Debug + Send {
    /// Bytes. Never changes; what is over whole sectors of 512 bytes is not shown to the guest.
    fn size(&self) -> u64;

    /// The files that have the disk's bytes, if that is all there is to it: then the kernel can be
    /// given several requests at once, where it is able to. What no part has goes through
    /// [`read`](Self::read) and [`write`](Self::write), one request after the other. Never changes.
    fn parts(&self) -> &[Part] {
        &[]
    }

    /// Fills all of `into` from `offset` on, or fails.
    fn read(&mut self, offset: u64, into: Vec<VolatileSlice<'_>>) -> io::Result<()>;

    /// Writes all of `from` from `offset` on, or fails.
    fn write(&mut self, offset: u64, from: Vec<VolatileSlice<'_>>) -> io::Result<()>;

    /// Returns when everything written before is durable.
    fn flush(&mut self) -> io::Result<()>;

    /// The guest has no more use for this range; what it reads there is up to the backend.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeroes; `may_unmap` allows to give its space back.
    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
}

/// A file and the range of a disk that it has from its beginning.
#[derive(Debug)]
pub struct Part {
    /// The file.
    pub file: File,
    /// Where on the disk its first byte is.
    pub start: u64,
    /// Bytes that it has.
    pub len: u64,
}

/// A disk.
#[derive(Debug)]
pub struct BlockConfig {
    /// Its name in logs and metrics.
    pub id: String,
    /// Its contents.
    pub backend: Box<dyn Backend>,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// What the guest finds in `/sys/block/*/serial`; at most 20 bytes, without NUL.
    pub serial: String,
}

/// Why a [`BlockConfig`] makes no disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number does not fit the request that asks for it.
    #[error("Disk serial {serial:?} is {} bytes, at most 20 without NUL are possible", serial.len())]
    Serial {
        /// The serial number.
        serial: String,
    },
}

/// Why an empty disk was not filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// There is no such disk.
    #[error("{device} is no disk of the VM")]
    NoDisk {
        /// The device's id.
        device: String,
    },
    /// It has something, which its driver may be at work with.
    #[error("Disk {device} is not empty: it has {sectors} sectors")]
    NotEmpty {
        /// The disk's id.
        device: String,
        /// Sectors of 512 bytes that it has.
        sectors: u64,
    },
    /// Nothing would be there still.
    #[error("Disk {device} can't be filled with less than a sector of 512 bytes")]
    Nothing {
        /// The disk's id.
        device: String,
    },
    /// The files can't be a disk's.
    #[error("Disk {device} can't be filled with these files")]
    Files {
        /// The disk's id.
        device: String,
        /// What is wrong with them.
        source: io::Error,
    },
    /// The disk's thread is gone.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// There is nobody left to use it.
    #[error("The VM has ended")]
    Ended,
}
