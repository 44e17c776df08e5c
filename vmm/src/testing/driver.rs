//! A driver's half of a split virtqueue (virtio 1.2, 2.7), with the means to break every rule.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Buffer, Guest};
use crate::devices::virtio::queue::Virtqueue;
use crate::devices::virtio::{ActiveQueue, F_RING_EVENT_IDX, Position};
use crate::sys::doorbell::Doorbell;

/// Descriptor flags.
pub mod flags {
    /// `VIRTQ_DESC_F_NEXT`
    pub const NEXT: u16 = 1;
    /// `VIRTQ_DESC_F_WRITE`
    pub const WRITE: u16 = 2;
    /// `VIRTQ_DESC_F_INDIRECT`
    pub const INDIRECT: u16 = 4;
}

/// What a device returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head, as [`DriverQueue::submit`] returned it.
    pub head: u16,
    /// The bytes the device says it wrote.
    pub written: u32,
}

/// A queue as its driver sees it.
#[derive(Debug)]
pub struct DriverQueue {
    guest: Guest,
    index: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    bell: Arc<Doorbell>,
    features: u64,
    free: Vec<u16>,
    /// Chains the device has, by head.
    lent: HashMap<u16, Vec<u16>>,
    /// Where the queue began: the device's half begins there too.
    start: u16,
    next_avail: u16,
    /// The available index at the last kick.
    kicked: u16,
    next_used: u16,
}

impl DriverQueue {
    /// Lays queue `index` of `size` descriptors out in the guest's memory.
    pub fn new(guest: &Guest, index: u16, size: u16) -> Self {
        let entries = u64::from(size);
        let mut queue = Self {
            guest: guest.clone(),
            index,
            size,
            desc: guest.alloc(16 * entries, 16),
            avail: guest.alloc(6 + 2 * entries, 2),
            used: guest.alloc(6 + 8 * entries, 4),
            bell: Arc::new(Doorbell::new().expect("a doorbell")),
            features: 0,
            free: Vec::new(),
            lent: HashMap::new(),
            start: 0,
            next_avail: 0,
            kicked: 0,
            next_used: 0,
        };
        queue.reset(0, 0);
        queue
    }

    /// Empties the rings; the next chain will be number `position` of the queue.
    pub fn reset(&mut self, features: u64, position: u16) {
        let entries = usize::from(self.size);
        self.guest.write(self.desc, &vec![0; 16 * entries]);
        self.guest.write(self.avail, &vec![0; 6 + 2 * entries]);
        self.guest.write(self.used, &vec![0; 6 + 8 * entries]);
        self.features = features;
        self.free = (0..self.size).rev().collect();
        self.lent.clear();
        self.start = position;
        self.next_avail = position;
        self.next_used = position;
        self.kicked = position;
        self.store16(self.avail + 2, position);
        self.store16(self.used + 2, position);
        if features & F_RING_EVENT_IDX != 0 {
            self.set_used_event(position);
            self.store16(self.avail_event(), position);
        }
        self.bell.clear().expect("a doorbell");
    }

    /// The ring registers as a transport would hand them on.
    pub fn ring(&self) -> Queue {
        let mut queue = Queue::new(self.size.next_power_of_two()).expect("a size");
        queue.set_size(self.size);
        let halves = |addr: u64| (Some(addr as u32), Some((addr >> 32) as u32));
        let ((low, high), (avail_low, avail_high), (used_low, used_high)) =
            (halves(self.desc), halves(self.avail), halves(self.used));
        queue.set_desc_table_address(low, high);
        queue.set_avail_ring_address(avail_low, avail_high);
        queue.set_used_ring_address(used_low, used_high);
        queue.set_next_avail(self.start);
        queue.set_next_used(self.start);
        queue.set_ready(true);
        queue
    }

    /// The device's half.
    pub fn device_side(&self) -> Virtqueue {
        self.device_side_of(self.ring())
    }

    fn device_side_of(&self, ring: Queue) -> Virtqueue {
        let event_idx = self.features & F_RING_EVENT_IDX != 0;
        let memory = self.guest.memory().clone();
        Virtqueue::new(self.index, memory, ring, event_idx).expect("a valid queue")
    }

    /// The device's half of a queue that goes on from `position`, with its doorbell.
    pub fn activate_at(&self, position: Position) -> ActiveQueue {
        let mut ring = self.ring();
        ring.set_next_avail(position.avail);
        ring.set_next_used(position.used);
        ActiveQueue {
            index: self.index,
            queue: self.device_side_of(ring),
            doorbell: Arc::clone(&self.bell),
        }
    }

    /// The device's half with its doorbell.
    pub fn activate(&self) -> ActiveQueue {
        ActiveQueue {
            index: self.index,
            queue: self.device_side(),
            doorbell: Arc::clone(&self.bell),
        }
    }

    /// Makes a chain of `buffers` available and returns its head. Readable ones come first.
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(
            !buffers.is_empty() && self.free.len() >= buffers.len(),
            "no free descriptors"
        );
        let taken = self.free.split_off(self.free.len() - buffers.len());
        for (place, buffer) in buffers.iter().enumerate() {
            let next = taken.get(place + 1).copied();
            self.write_descriptor(taken[place], *buffer, next);
        }
        self.lend(taken[0], taken)
    }

    /// Like [`DriverQueue::submit`], with one descriptor that refers to a table of them.
    pub fn submit_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let table = self.guest.alloc(16 * buffers.len() as u64, 16);
        for (place, buffer) in buffers.iter().enumerate() {
            let next = (place + 1 < buffers.len()).then_some(place as u16 + 1);
            let entry = descriptor(*buffer, next);
            self.guest.write(table + 16 * place as u64, &entry);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.raw_descriptor(head, table, 16 * buffers.len() as u32, flags::INDIRECT, 0);
        self.lend(head, vec![head])
    }

    fn lend(&mut self, head: u16, descriptors: Vec<u16>) -> u16 {
        self.lent.insert(head, descriptors);
        self.publish(head);
        head
    }

    fn write_descriptor(&self, index: u16, buffer: Buffer, next: Option<u16>) {
        self.guest
            .write(self.desc + 16 * u64::from(index), &descriptor(buffer, next));
    }

    /// Writes a descriptor, right or wrong.
    pub fn raw_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let entry = raw(addr, len, flags, next);
        self.guest
            .write(self.desc + 16 * u64::from(index % self.size), &entry);
    }

    /// Puts `head` into the available ring and moves its index on, right or wrong.
    pub fn publish(&mut self, head: u16) {
        self.store16(
            self.avail + 4 + 2 * u64::from(self.next_avail % self.size),
            head,
        );
        self.set_avail_index(self.next_avail.wrapping_add(1));
    }

    /// Sets the available index, right or wrong.
    pub fn set_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        self.store16(self.avail + 2, index);
    }

    /// How many chains were made available, modulo 2^16.
    pub fn avail_index(&self) -> u16 {
        self.next_avail
    }

    /// Asks for no interrupts (without EVENT_IDX).
    pub fn set_no_interrupt(&self, suppressed: bool) {
        self.store16(self.avail, suppressed.into());
    }

    /// Asks for an interrupt when the used index passes `index` (with EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.store16(self.avail + 4 + 2 * u64::from(self.size), index);
    }

    /// Rings the doorbell if the device asked for notifications; tells whether it did.
    pub fn kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.next_avail);
        let wanted = if self.features & F_RING_EVENT_IDX != 0 {
            // Has the index passed the one the device waits for (virtio 1.2, 2.7.10)?
            let behind = self
                .next_avail
                .wrapping_sub(self.load16(self.avail_event()));
            behind.wrapping_sub(1) < self.next_avail.wrapping_sub(old)
        } else {
            self.load16(self.used) & 1 == 0
        };
        if wanted {
            self.ring_bell();
        }
        wanted
    }

    /// Rings the doorbell of another queue from now on.
    pub fn share_bell(&mut self, other: &Self) {
        self.bell = Arc::clone(&other.bell);
    }

    /// Rings the doorbell whatever the device wants.
    pub fn ring_bell(&self) {
        self.bell.ring().expect("a doorbell");
    }

    /// The next chain the device has returned.
    ///
    /// # Panics
    /// When the device returned what it did not have.
    pub fn used(&mut self) -> Option<Used> {
        if self.load16(self.used + 2) == self.next_used {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        if self.features & F_RING_EVENT_IDX != 0 {
            self.set_used_event(self.next_used);
        }
        let bytes = self.guest.read(entry, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let head = u16::try_from(word(0)).expect("a descriptor index");
        let descriptors = self.lent.remove(&head);
        self.free
            .extend(descriptors.expect("the device returned a chain it did not have"));
        Some(Used {
            head,
            written: word(4),
        })
    }

    /// How many chains the device has returned in all, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        self.load16(self.used + 2)
    }

    /// Chains that the device has.
    pub fn lent(&self) -> usize {
        self.lent.len()
    }

    /// Descriptors in the queue.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest addresses of descriptor table, available and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.desc, self.avail, self.used]
    }

    fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }

    fn store16(&self, addr: u64, value: u16) {
        let memory = self.guest.memory();
        memory
            .store(value.to_le(), GuestAddress(addr), Ordering::Release)
            .expect("an address in RAM");
    }

    fn load16(&self, addr: u64) -> u16 {
        let value: u16 = self
            .guest
            .memory()
            .load(GuestAddress(addr), Ordering::Acquire)
            .expect("an address in RAM");
        u16::from_le(value)
    }
}

fn descriptor(buffer: Buffer, next: Option<u16>) -> [u8; 16] {
    let write = if buffer.writable { flags::WRITE } else { 0 };
    let more = if next.is_some() { flags::NEXT } else { 0 };
    raw(buffer.addr, buffer.len, write | more, next.unwrap_or(0))
}

pub(super) fn raw(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&addr.to_le_bytes());
    entry[8..12].copy_from_slice(&len.to_le_bytes());
    entry[12..14].copy_from_slice(&flags.to_le_bytes());
    entry[14..].copy_from_slice(&next.to_le_bytes());
    entry
}
