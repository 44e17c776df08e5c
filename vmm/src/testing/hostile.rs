//! A driver without manners. Bytes decide what it does, so that property tests and fuzzers can
//! search for the deed that hurts.

use super::driver::raw;
use super::{DriverQueue, Guest, Rig, flags};
use crate::devices::virtio::{F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_VERSION_1, VirtioDevice};

/// Activates the device and does what `bytes` say; the device may fault, but not panic, and always
/// comes to rest.
pub fn run<D: VirtioDevice>(rig: &mut Rig<D>, bytes: &[u8]) {
    let mut script = Script(bytes);
    let ring = match script.byte() & 3 {
        0 => 0,
        1 => F_RING_EVENT_IDX,
        2 => F_RING_INDIRECT_DESC,
        _ => F_RING_EVENT_IDX | F_RING_INDIRECT_DESC,
    };
    // Any subset of what is offered may be accepted.
    let accepted = match script.byte() & 3 {
        0 => rig.device.features() & script.long(),
        _ => rig.device.features(),
    };
    let position = if script.byte() & 1 == 0 {
        0
    } else {
        u16::MAX - 2
    };
    let data = rig.guest.alloc(64 << 10, 4096);
    if rig
        .activate_with(accepted | F_VERSION_1 | ring, position)
        .is_err()
    {
        return;
    }
    while !script.0.is_empty() {
        let count = rig.queues.len();
        let index = usize::from(script.byte()) % count;
        step(rig, &mut script, index, data);
    }
    for queue in &rig.queues {
        queue.ring_bell();
    }
    rig.run();
}

fn step<D: VirtioDevice>(rig: &mut Rig<D>, script: &mut Script<'_>, index: usize, data: u64) {
    match script.byte() % 16 {
        deed @ 0..=13 => spoil(&rig.guest, &mut rig.queues, script, (deed, index), data),
        14 => {
            let bytes = script.long().to_le_bytes();
            rig.device
                .write_config(u64::from(script.byte()), &bytes[..1 << (bytes[7] % 4)]);
        }
        _ => {
            rig.queues[index].ring_bell();
            rig.run();
        }
    }
}

/// Deed 0 to 13 upon the rings of queue `index`, or on memory that they may refer to.
pub(super) fn spoil(
    guest: &Guest,
    queues: &mut [DriverQueue],
    script: &mut Script<'_>,
    (deed, index): (u8, usize),
    data: u64,
) {
    let size = queues[index].size();
    match deed {
        // A descriptor, wild or plausible.
        0..=4 => {
            let (addr, len) = (script.address(guest, queues, data), script.length());
            let (flags, next) = (script.flags(), u16::from(script.byte()) % (size + 1));
            let at = u16::from(script.byte()) % size;
            queues[index].raw_descriptor(at, addr, len, flags, next);
        }
        // Contents: what a descriptor may refer to, an indirect table among them.
        5 | 6 => {
            let at = data + u64::from(script.byte()) * 16;
            let fill: Vec<u8> = (0..script.byte() % 64).map(|_| script.byte()).collect();
            guest.write(at, &fill);
        }
        7 => {
            let at = data + u64::from(script.byte() % 32) * 16;
            let (addr, len) = (script.address(guest, queues, data), script.length());
            let entry = raw(addr, len, script.flags(), u16::from(script.byte()) % 40);
            guest.write(at, &entry);
        }
        // A good chain: readable, then writable, both in RAM.
        8..=10 => {
            let readable = u32::from(script.byte());
            let writable = u32::from(script.byte());
            let head = u16::from(script.byte()) % size;
            let tail = (head + 1) % size;
            let queue = &mut queues[index];
            queue.raw_descriptor(head, data, readable, flags::NEXT, tail);
            queue.raw_descriptor(tail, data + 4096, writable, flags::WRITE, 0);
            queue.publish(head);
        }
        11 | 12 => {
            let head = u16::from(script.byte()) % (size + 1);
            queues[index].publish(head);
        }
        _ => {
            let jump = u16::from(script.byte());
            let index_now = queues[index].avail_index();
            queues[index].set_avail_index(index_now.wrapping_add(jump));
        }
    }
}

/// Bytes, and zeroes behind their end.
pub(super) struct Script<'a>(pub(super) &'a [u8]);

impl Script<'_> {
    pub(super) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    pub(super) fn long(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    pub(super) fn address(&mut self, guest: &Guest, queues: &[DriverQueue], data: u64) -> u64 {
        let small = u64::from(self.byte()) * 16;
        match self.byte() % 12 {
            0 => 0,
            1 => guest.end() - small,
            2 => guest.end() + small,
            3 => u64::MAX - small,
            4 => self.long(),
            // Onto the rings themselves.
            5 => {
                let queue = &queues[usize::from(self.byte()) % queues.len()];
                queue.addresses()[usize::from(self.byte()) % 3] + small
            }
            _ => data + small,
        }
    }

    fn length(&mut self) -> u32 {
        let small = u32::from(self.byte());
        match self.byte() % 8 {
            0 => 0,
            1 => u32::MAX - small,
            2 => small << 20,
            3 => small << 8,
            4 | 5 => small * 16,
            _ => small,
        }
    }

    fn flags(&mut self) -> u16 {
        match self.byte() % 8 {
            0 => 0,
            1 | 2 => flags::NEXT,
            3 => flags::WRITE,
            4 => flags::WRITE | flags::NEXT,
            5 => flags::INDIRECT,
            6 => flags::INDIRECT | flags::NEXT,
            _ => u16::from(self.byte()),
        }
    }
}
