//! Split virtqueues (virtio 1.2, 2.7), as every device uses them.
//!
//! [`Virtqueue`] wraps [`virtio_queue::Queue`] for the rings and walks descriptor chains itself, so
//! that nothing a driver gets wrong passes unseen: whatever breaks the ring's rules is a
//! [`RingFault`], which stops the device. A [`Chain`] that was popped has been read once, whole, and
//! lies within guest RAM; what the driver does to its descriptors afterwards has no effect.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

mod chain;
mod cursor;
mod fault;
mod serve;
#[cfg(test)]
mod tests;
mod walk;

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::Position;
use crate::memory::GuestMemory;
#[cfg(any(test, feature = "testing"))]
use chain::Watch;
pub use chain::{Chain, Segment};
pub use cursor::{CursorError, Reader, Writer};
pub use fault::{Part, RingFault};
pub use serve::ServeError;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A split virtqueue the driver has configured.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    memory: GuestMemory,
    ring: Queue,
    /// Chains popped and not completed.
    in_flight: u16,
    /// Chains completed since the last [`Virtqueue::should_notify`].
    completed: bool,
    /// A chain's storage, kept for the next one.
    spare: Vec<Segment>,
    #[cfg(any(test, feature = "testing"))]
    watch: Watch,
}

impl Virtqueue {
    /// Takes over `ring`, the queue number `index` of its device, which the driver has made ready.
    ///
    /// # Errors
    /// A queue that is not ready, or a part of it that is not in guest RAM.
    pub fn new(
        index: u16,
        memory: GuestMemory,
        mut ring: Queue,
        event_idx: bool,
    ) -> Result<Self, RingFault> {
        if !ring.ready() {
            return Err(RingFault::NotReady { queue: index });
        }
        let size = u64::from(ring.size());
        for (part, addr, header, element) in [
            (Part::Descriptors, ring.desc_table(), 0_u64, 16_u64),
            (Part::Available, ring.avail_ring(), 6, 2),
            (Part::Used, ring.used_ring(), 6, 8),
        ] {
            // At most 16 * 32768: no overflow.
            let len = element.saturating_mul(size).saturating_add(header);
            // Address 0 is what a queue has whose driver set none, or one that is not aligned.
            if addr == 0 || !in_ram(&memory, GuestAddress(addr), len) {
                return Err(RingFault::Outside {
                    queue: index,
                    part,
                    addr,
                    len,
                });
            }
        }
        ring.set_event_idx(event_idx);
        Ok(Self {
            index,
            memory,
            ring,
            in_flight: 0,
            completed: false,
            spare: Vec::new(),
            #[cfg(any(test, feature = "testing"))]
            watch: Watch::default(),
        })
    }

    /// The queue's number on its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many descriptors the driver gave the queue.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Chains popped and neither completed nor put back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The memory that chains of this queue lie in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Takes the next chain the driver made available.
    ///
    /// # Errors
    /// Anything in the ring or the chain that virtio 1.2, 2.7 forbids a driver.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingFault> {
        let popped = self.pop_checked();
        #[cfg(any(test, feature = "testing"))]
        if popped.is_err() {
            self.watch.release();
        }
        popped
    }

    /// Takes the next chain, or has the driver notify of it.
    ///
    /// # Errors
    /// As [`Virtqueue::pop`], and the ring can't be accessed.
    pub fn pop_or_notify(&mut self) -> Result<Option<Chain>, RingFault> {
        match self.pop()? {
            None if self.enable_notification()? => self.pop(),
            popped => Ok(popped),
        }
    }

    fn pop_checked(&mut self) -> Result<Option<Chain>, RingFault> {
        let queue = self.index;
        let size = self.ring.size();
        let next = self.ring.next_avail();
        let avail = self.avail_idx(Ordering::Acquire)?;
        if avail == next {
            return Ok(None);
        }
        if self.in_flight >= size {
            return Err(RingFault::TooManyInFlight { queue, size });
        }
        // `iter` checks that the driver is not more than the ring's size ahead.
        let mut heads = self.ring.iter(&self.memory).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => RingFault::AvailableIndex {
                queue,
                avail,
                next,
                size,
            },
            source => RingFault::Access {
                queue,
                part: Part::Available,
                source,
            },
        })?;
        let head =
            heads
                .next()
                .map(|chain| chain.head_index())
                .ok_or(RingFault::AvailableIndex {
                    queue,
                    avail,
                    next,
                    size,
                })?;

        let mut segments = std::mem::take(&mut self.spare);
        segments.clear();
        let table = GuestAddress(self.ring.desc_table());
        let layout = walk::walk(&self.memory, queue, table, size, head, &mut segments)?;
        self.in_flight = self.in_flight.saturating_add(1);
        Ok(Some(Chain::new(
            self.memory.clone(),
            queue,
            head,
            self.ring.next_avail(),
            segments,
            layout,
            #[cfg(any(test, feature = "testing"))]
            self.watch.clone(),
        )))
    }

    /// Gives `chain` back to the driver; the device wrote its first `written` writable bytes.
    ///
    /// # Errors
    /// The used ring can't be written, or the chain is not of this queue.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), RingFault> {
        let queue = self.index;
        let head = chain.head();
        if chain.queue() != queue {
            return Err(RingFault::WrongQueue {
                queue,
                of: chain.queue(),
            });
        }
        debug_assert!(
            u64::from(written) <= chain.writable_len(),
            "wrote beyond the chain"
        );
        self.spare = chain.release();
        self.in_flight = self.in_flight.saturating_sub(1);
        self.completed = true;
        self.ring
            .add_used(&self.memory, head, written)
            .map_err(|source| RingFault::Access {
                queue,
                part: Part::Used,
                source,
            })
    }

    /// Puts the chain popped last back; the next [`Virtqueue::pop`] reads it anew.
    pub fn undo_pop(&mut self, chain: Chain) {
        let newest = chain.queue() == self.index && chain.position() == self.ring.next_avail();
        debug_assert!(newest, "only the newest chain can be put back");
        self.spare = chain.release();
        if newest {
            self.ring.go_to_previous_position();
            self.in_flight = self.in_flight.saturating_sub(1);
        }
    }

    /// Whether the driver wants an interrupt for what was completed since the last call
    /// (virtio 1.2, 2.7.7). Having answered true, it takes the interrupt as sent.
    ///
    /// # Errors
    /// The driver's part of the ring can't be read.
    pub fn should_notify(&mut self) -> Result<bool, RingFault> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        let access = |source| RingFault::Access {
            queue: self.index,
            part: Part::Available,
            source,
        };
        if self.ring.event_idx_enabled() {
            return self.ring.needs_notification(&self.memory).map_err(access);
        }
        // The used index must be visible before the flag is read (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)
            .map_err(|source| access(virtio_queue::Error::GuestMemory(source)))?;
        Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver to notify of the next chain; true when one is there already and no
    /// notification may come for it.
    ///
    /// # Errors
    /// The ring can't be accessed.
    pub fn enable_notification(&mut self) -> Result<bool, RingFault> {
        // What is asked for already isn't written: of a clone's memory, each page that is costs one.
        if self.ring.event_idx_enabled() && self.avail_event()? == self.ring.next_avail() {
            return self.has_pending();
        }
        self.ring
            .enable_notification(&self.memory)
            .map_err(|source| RingFault::Access {
                queue: self.index,
                part: Part::Used,
                source,
            })
    }

    /// Tells the driver that notifications are not needed; it may send some all the same.
    ///
    /// # Errors
    /// The ring can't be accessed.
    pub fn disable_notification(&mut self) -> Result<(), RingFault> {
        self.ring
            .disable_notification(&self.memory)
            .map_err(|source| RingFault::Access {
                queue: self.index,
                part: Part::Used,
                source,
            })
    }

    /// Whether the driver has made a chain available that was not popped yet.
    ///
    /// # Errors
    /// The ring can't be accessed.
    pub fn has_pending(&self) -> Result<bool, RingFault> {
        Ok(self.avail_idx(Ordering::Acquire)? != self.ring.next_avail())
    }

    /// How far the device is, as if it had not popped the `held` chains it popped last. It must hold
    /// no others.
    pub fn position(&self, held: usize) -> Position {
        debug_assert_eq!(
            held,
            usize::from(self.in_flight),
            "chains that would be lost"
        );
        Position {
            // A queue has at most 2^15 chains.
            avail: self.ring.next_avail().wrapping_sub(held as u16),
            used: self.ring.next_used(),
        }
    }

    /// The positions and addresses of the ring.
    pub fn state(&self) -> QueueState {
        self.ring.state()
    }

    /// Which chain the driver is to notify of.
    fn avail_event(&self) -> Result<u16, RingFault> {
        let used = GuestAddress(self.ring.used_ring());
        // Behind flags, index and elements (virtio 1.2, 2.7.8): in guest RAM, as all of the part.
        let offset = u64::from(self.ring.size())
            .saturating_mul(8)
            .saturating_add(4);
        self.memory
            .load(used.unchecked_add(offset), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|source| RingFault::Access {
                queue: self.index,
                part: Part::Used,
                source: virtio_queue::Error::GuestMemory(source),
            })
    }

    fn avail_idx(&self, order: Ordering) -> Result<u16, RingFault> {
        self.ring
            .avail_idx(&self.memory, order)
            .map(|Wrapping(index)| index)
            .map_err(|source| RingFault::Access {
                queue: self.index,
                part: Part::Available,
                source,
            })
    }
}

/// Whether `len` bytes from `addr` are guest RAM.
fn in_ram(memory: &GuestMemory, addr: GuestAddress, len: u64) -> bool {
    usize::try_from(len).is_ok_and(|len| memory.check_range(addr, len))
}
