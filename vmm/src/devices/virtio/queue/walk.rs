//! From a head index to the buffers of a chain: the one place that follows descriptors.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::{Part, RingFault, Segment, in_ram};
use crate::memory::GuestMemory;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// Drivers with large requests build indirect tables longer than a small queue, though virtio 1.2,
/// 2.7.5.3.1 says they must not. This many are accepted: as many as one vectored system call takes.
const INDIRECT_LIMIT: u32 = 1024;

/// Where a chain's writable buffers begin, and its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layout {
    /// How many of the segments are readable; the others are writable.
    pub(super) readable: usize,
    pub(super) readable_len: u64,
    pub(super) writable_len: u64,
}

/// Follows the chain from `head`, and appends its buffers to `segments` (empty ones left out).
pub(super) fn walk(
    memory: &GuestMemory,
    queue: u16,
    table: GuestAddress,
    size: u16,
    head: u16,
    segments: &mut Vec<Segment>,
) -> Result<Layout, RingFault> {
    let mut layout = Layout::default();
    let mut table = table;
    let mut entries = u32::from(size);
    let mut limit = entries;
    let mut visited: u32 = 0;
    let mut indirect = false;
    let mut index = head;
    loop {
        // A loop ends here.
        if visited >= limit {
            return Err(RingFault::TooLong { queue, head, limit });
        }
        visited = visited.saturating_add(1);
        if u32::from(index) >= entries {
            return Err(RingFault::DescriptorIndex {
                queue,
                head,
                descriptor: index,
                size: entries,
            });
        }
        let descriptor = read(memory, queue, table, index)?;

        if descriptor.refers_to_indirect_table() {
            // virtio 1.2, 2.7.5.3.1: neither nested, nor followed by another. Its write flag is
            // ignored (2.7.5.3.2).
            if indirect || descriptor.has_next() {
                return Err(RingFault::IndirectMisplaced { queue, head });
            }
            let len = descriptor.len();
            if len == 0 || len.checked_rem(DESCRIPTOR) != Some(0) {
                return Err(RingFault::IndirectLength { queue, head, len });
            }
            let addr = descriptor.addr();
            if !in_ram(memory, addr, u64::from(len)) {
                return Err(RingFault::IndirectOutside {
                    queue,
                    head,
                    addr: addr.0,
                    len,
                });
            }
            table = addr;
            entries = len.checked_div(DESCRIPTOR).unwrap_or(0);
            limit = entries.min(u32::from(size).max(INDIRECT_LIMIT));
            visited = 0;
            indirect = true;
            index = 0;
            continue;
        }

        append(memory, queue, head, &descriptor, segments, &mut layout)?;
        if !descriptor.has_next() {
            return Ok(layout);
        }
        index = descriptor.next();
    }
}

fn read(
    memory: &GuestMemory,
    queue: u16,
    table: GuestAddress,
    index: u16,
) -> Result<Descriptor, RingFault> {
    let part = Part::Descriptors;
    let offset = u64::from(index).saturating_mul(u64::from(DESCRIPTOR));
    let addr = table.checked_add(offset).ok_or(RingFault::Access {
        queue,
        part,
        source: virtio_queue::Error::AddressOverflow,
    })?;
    memory.read_obj(addr).map_err(|source| RingFault::Access {
        queue,
        part,
        source: virtio_queue::Error::GuestMemory(source),
    })
}

fn append(
    memory: &GuestMemory,
    queue: u16,
    head: u16,
    descriptor: &Descriptor,
    segments: &mut Vec<Segment>,
    layout: &mut Layout,
) -> Result<(), RingFault> {
    let (addr, len) = (descriptor.addr(), descriptor.len());
    let writable = descriptor.is_write_only();
    if !writable && segments.len() > layout.readable {
        return Err(RingFault::ReadableAfterWritable {
            queue,
            head,
            addr: addr.0,
        });
    }
    if len == 0 {
        return Ok(());
    }
    if !in_ram(memory, addr, u64::from(len)) {
        return Err(RingFault::BufferOutside {
            queue,
            head,
            addr: addr.0,
            len,
        });
    }
    let total = layout.readable_len.saturating_add(layout.writable_len);
    if total.saturating_add(u64::from(len)) > 1 << 32 {
        return Err(RingFault::TooManyBytes { queue, head });
    }
    segments.push(Segment { addr, len });
    if writable {
        layout.writable_len = layout.writable_len.saturating_add(u64::from(len));
    } else {
        layout.readable = segments.len();
        layout.readable_len = layout.readable_len.saturating_add(u64::from(len));
    }
    Ok(())
}
