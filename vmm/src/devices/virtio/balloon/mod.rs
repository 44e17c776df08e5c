//! virtio-balloon (virtio 1.2, 5.5): memory the guest does not need goes back to the host.
//!
//! The host sets a target ([`Handle::set_target`]); the driver takes that many pages out of use and
//! names them on the inflate queue, or takes them back on the deflate queue. With page reporting it
//! also names pages that merely are free. Everything a guest says here is a wish: pages that are not
//! RAM, are named twice or are in no balloon are passed over and counted, and a page of the host is
//! discarded only when every guest page in it is in the balloon.

mod device;
mod handle;
mod metrics;
mod pages;
#[cfg(test)]
mod tests;
pub mod wire;
mod worker;

use std::fmt;

use vm_memory::GuestAddress;

use crate::memory::{DiscardError, Discarded, GuestMemory};

pub use device::Balloon;
pub use handle::{BalloonError, Handle, Report};
pub use metrics::Metrics;
pub use wire::Stats;

/// Bytes of a page in PFN lists, whatever the guest's own page size (virtio 1.2, 5.5.6).
pub const PAGE: u64 = 4096;

/// Device ID (virtio 1.2, 5.5.1).
const TYPE: u32 = 5;

// Feature bits (virtio 1.2, 5.5.3).
const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// What a balloon offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// The largest target, in bytes: what has to stay with the guest is the machine's to say.
    pub limit: u64,
    /// A guest short of memory takes pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest reports free pages by itself, without a target.
    pub page_reporting: bool,
    /// The guest tells how it uses its memory.
    pub stats: bool,
}

/// Gives guest memory back to the host; [`GuestMemory`] is the one outside tests.
trait Discard: fmt::Debug + Send {
    /// Discards whole host pages.
    fn discard(&self, start: GuestAddress, len: u64) -> Result<Discarded, DiscardError>;
}

impl Discard for GuestMemory {
    fn discard(&self, start: GuestAddress, len: u64) -> Result<Discarded, DiscardError> {
        GuestMemory::discard(self, start, len)
    }
}

/// What discarding depends on.
#[derive(Debug)]
struct Host {
    /// Bytes of a page of the host: a power of two, at least [`PAGE`].
    page: u64,
    discard: Box<dyn Discard>,
}

impl Host {
    fn of(memory: &GuestMemory) -> Self {
        Self {
            page: memory.host_page().max(PAGE),
            discard: Box::new(memory.clone()),
        }
    }
}
