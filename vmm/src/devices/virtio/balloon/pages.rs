//! Which guest pages are in the balloon, and which host pages are complete.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::PAGE;
use crate::memory::GuestMemory;

/// Why a page was not put in or taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// There is no RAM.
    NotRam,
    /// It is in already, or is not in.
    Unchanged,
}

/// A bit for every page of guest RAM.
#[derive(Debug)]
pub(super) struct PageSet {
    regions: Vec<Region>,
    /// Guest pages in a host page.
    host_pages: u64,
}

#[derive(Debug)]
struct Region {
    first: u64,
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set for `memory` on a host with pages of `host_page` bytes.
    pub(super) fn new(memory: &GuestMemory, host_page: u64) -> Self {
        let regions = memory
            .iter()
            .map(|region| {
                let pages = region.len() / PAGE;
                let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
                Region {
                    first: region.start_addr().0 / PAGE,
                    pages,
                    words: vec![0; words],
                }
            })
            .collect();
        Self {
            regions,
            host_pages: (host_page / PAGE).max(1),
        }
    }

    /// Puts a page in. Answers with the first guest page of the host page that is complete by that,
    /// if one is.
    pub(super) fn insert(&mut self, pfn: u32) -> Result<Option<u64>, Refused> {
        let pfn = u64::from(pfn);
        let host_pages = self.host_pages;
        let region = self.region(pfn)?;
        if !region.set(pfn, true) {
            return Err(Refused::Unchanged);
        }
        // A host page that reaches beyond its region never gets complete.
        let first = pfn - pfn % host_pages;
        let complete = (first..first + host_pages).all(|pfn| region.has(pfn));
        Ok(complete.then_some(first))
    }

    /// Takes a page out.
    pub(super) fn remove(&mut self, pfn: u32) -> Result<(), Refused> {
        if !self.region(u64::from(pfn))?.set(u64::from(pfn), false) {
            return Err(Refused::Unchanged);
        }
        Ok(())
    }

    /// What is in, as runs of first page and count.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for region in &self.regions {
            // A region begins a run of its own, adjacent or not: nobody counts them.
            let mut open = false;
            for (word, first) in region.words.iter().zip((region.first..).step_by(64)) {
                if *word == 0 {
                    open = false;
                    continue;
                }
                for (bit, pfn) in (0..64).zip(first..) {
                    let inside = word & (1 << bit) != 0;
                    match runs.last_mut() {
                        Some((_, count)) if open && inside => *count += 1,
                        _ if inside => runs.push((pfn, 1)),
                        _ => {}
                    }
                    open = inside;
                }
            }
        }
        runs
    }

    /// Puts in what [`runs`](Self::runs) told; what is no RAM is passed over.
    pub(super) fn insert_runs(&mut self, runs: &[(u64, u64)]) {
        for &(first, count) in runs {
            for region in &mut self.regions {
                let from = first.max(region.first);
                let to = first.saturating_add(count).min(region.first + region.pages);
                for pfn in from..to {
                    region.set(pfn, true);
                }
            }
        }
    }

    fn region(&mut self, pfn: u64) -> Result<&mut Region, Refused> {
        self.regions
            .iter_mut()
            .find(|region| region.place(pfn).is_some())
            .ok_or(Refused::NotRam)
    }
}

impl Region {
    /// Word and bit of a page, if it is of this region.
    fn place(&self, pfn: u64) -> Option<(usize, u64)> {
        let index = pfn
            .checked_sub(self.first)
            .filter(|index| *index < self.pages)?;
        Some((usize::try_from(index / 64).ok()?, 1 << (index % 64)))
    }

    fn has(&self, pfn: u64) -> bool {
        self.place(pfn)
            .and_then(|(word, bit)| Some(self.words.get(word)? & bit != 0))
            .unwrap_or(false)
    }

    /// Sets a page's bit; answers whether it was different.
    fn set(&mut self, pfn: u64, present: bool) -> bool {
        let Some((word, bit)) = self.place(pfn) else {
            return false;
        };
        let Some(word) = self.words.get_mut(word) else {
            return false;
        };
        let before = *word & bit != 0;
        if before != present {
            *word ^= bit;
        }
        before != present
    }
}

/// Puts host pages, given by their first guest page, in order and merges what is adjacent; the
/// answer is first guest page and count of guest pages.
pub(super) fn merge(mut firsts: Vec<u64>, host_pages: u64) -> Vec<(u64, u64)> {
    firsts.sort_unstable();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for first in firsts {
        match runs.last_mut() {
            Some((start, count)) if *start + *count == first => *count += host_pages,
            _ => runs.push((first, host_pages)),
        }
    }
    runs
}
