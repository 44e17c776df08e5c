//! virtio-balloon (virtio 1.2, 5.5): memory the guest does not need goes back to the host.
//!
//! The host sets a target ([`Handle::set_target`]); the driver takes that many pages out of use and
//! names them on the inflate queue, or takes them back on the deflate queue. With page reporting it
//! also names pages that merely are free. Everything a guest says here is a wish: pages that are not
//! RAM, are named twice or are in no balloon are passed over and counted, and a page of the host is
//! discarded only when every guest page in it is in the balloon.
//!
//! Free pages come back in three ways: [reported](BalloonConfig::page_reporting) by the guest all the
//! time, [hinted](BalloonConfig::free_page_hint) when the host asks, or by a target.

mod device;
mod handle;
mod hints;
mod metrics;
mod pages;
mod reclaim;
mod state;
#[cfg(test)]
mod tests;
pub mod wire;
mod worker;

use std::fmt;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::memory::{DiscardError, GuestMemory};

pub use device::Balloon;
pub use handle::{BalloonError, Handle, Report};
pub use metrics::Metrics;
pub use state::BalloonState;
pub use wire::Stats;

/// Bytes of a page in PFN lists, whatever the guest's own page size (virtio 1.2, 5.5.6).
pub const PAGE: u64 = 4096;

/// Device ID (virtio 1.2, 5.5.1).
const TYPE: u32 = 5;

// Feature bits (virtio 1.2, 5.5.3).
const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// What a balloon offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Bytes that no target may take from the guest. A machine keeps an eighth of its memory, and
    /// what a kernel needs, whatever is said here.
    pub floor: u64,
    /// A guest short of memory takes pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest reports free pages by itself, without a target.
    pub page_reporting: bool,
    /// The guest can be asked for its free pages ([`Handle::discard_free_pages`]).
    pub free_page_hint: bool,
    /// The guest tells how it uses its memory.
    pub stats: bool,
}

impl Default for BalloonConfig {
    /// Everything but hints, which reporting makes unnecessary, and no floor but the machine's.
    fn default() -> Self {
        Self {
            floor: 0,
            deflate_on_oom: true,
            page_reporting: true,
            free_page_hint: false,
            stats: true,
        }
    }
}

/// Gives guest memory back to the host; [`GuestMemory`] is the one outside tests.
trait Discard: fmt::Debug + Send {
    /// Discards whole host pages.
    fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError>;
}

impl Discard for GuestMemory {
    fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError> {
        GuestMemory::discard(self, start, len)
    }
}

/// What discarding depends on.
#[derive(Debug)]
struct Host {
    /// Bytes that the host takes back as one, such as a page of its own: a power of two, at least
    /// [`PAGE`].
    page: u64,
    discard: Box<dyn Discard>,
}

impl Host {
    fn of(memory: &GuestMemory) -> Self {
        Self {
            page: memory.discard_unit().max(PAGE),
            discard: Box::new(memory.clone()),
        }
    }
}
