//! What the driver writes: page lists and statistics. Pure.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

/// Bytes of an entry in a page list.
pub const PFN_LEN: usize = 4;
/// The most entries of one list that are read; Linux sends 256.
pub const MAX_PFNS: usize = 4096;
/// Bytes of a statistic.
pub const STAT_LEN: usize = 10;
/// The most statistics of one buffer that are read; 16 are defined.
pub const MAX_STATS: usize = 64;

/// The page frame numbers in `bytes`; a remainder that is no whole number is left out.
pub fn pfns(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes
        .as_chunks::<PFN_LEN>()
        .0
        .iter()
        .map(|pfn| u32::from_le_bytes(*pfn))
}

/// What a guest says about its memory (virtio 1.2, 5.5.6.3). Absent is what it did not say; amounts
/// are bytes, counts are since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Swapped in.
    pub swap_in: Option<u64>,
    /// Swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    pub minor_faults: Option<u64>,
    /// Memory not used for anything.
    pub free: Option<u64>,
    /// All memory the guest sees.
    pub total: Option<u64>,
    /// Memory to be had without swapping.
    pub available: Option<u64>,
    /// Memory used for the page cache that could be reclaimed.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated, as a count.
    pub huge_pages: Option<u64>,
    /// Huge pages that could not be allocated, as a count.
    pub huge_page_failures: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
}

impl Stats {
    /// Reads what is in a buffer of the statistics queue. Tags that are unknown are left out; of a
    /// tag that comes twice the last counts.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for [t0, t1, value @ ..] in bytes.as_chunks::<STAT_LEN>().0.iter().take(MAX_STATS) {
            if let Some(field) = stats.field(u16::from_le_bytes([*t0, *t1])) {
                *field = Some(u64::from_le_bytes(*value));
            }
        }
        stats
    }

    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            8 => &mut self.huge_pages,
            9 => &mut self.huge_page_failures,
            10 => &mut self.oom_kills,
            _ => return None,
        })
    }
}
