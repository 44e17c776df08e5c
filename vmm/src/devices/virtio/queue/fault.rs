//! How a driver can break a queue.

use std::fmt;

/// One of the three parts of a split virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The descriptor table.
    Descriptors,
    /// The available ring, written by the driver.
    Available,
    /// The used ring, written by the device.
    Used,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptor table",
            Self::Available => "available ring",
            Self::Used => "used ring",
        })
    }
}

/// The driver broke the rules of virtio 1.2, 2.7: the queue's device can't go on and needs a reset.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages name every field")]
pub enum RingFault {
    /// The driver did not make the queue ready.
    #[error("Queue {queue} is not ready")]
    NotReady { queue: u16 },
    /// A part of the queue is not aligned or not in guest RAM.
    #[error("Queue {queue}: {part} at {addr:#x}+{len:#x} is not aligned guest RAM")]
    Outside {
        queue: u16,
        part: Part,
        addr: u64,
        len: u64,
    },
    /// A part of the queue can't be accessed.
    #[error("Queue {queue}: cannot access the {part}")]
    Access {
        queue: u16,
        part: Part,
        source: virtio_queue::Error,
    },
    /// The driver made more chains available than the ring holds.
    #[error("Queue {queue}: available index {avail} is not within {size} of {next}")]
    AvailableIndex {
        queue: u16,
        avail: u16,
        next: u16,
        size: u16,
    },
    /// The driver made descriptors available again that the device has not returned.
    #[error("Queue {queue}: more than {size} chains made available at once")]
    TooManyInFlight { queue: u16, size: u16 },
    /// A descriptor's number is not in its table.
    #[error("Queue {queue}: chain {head} leads to descriptor {descriptor} of {size}")]
    DescriptorIndex {
        queue: u16,
        head: u16,
        descriptor: u16,
        size: u32,
    },
    /// A chain loops, or is longer than its queue (virtio 1.2, 2.7.5.3.1).
    #[error("Queue {queue}: chain {head} has more than {limit} descriptors")]
    TooLong { queue: u16, head: u16, limit: u32 },
    /// A chain is longer than 2^32 bytes (virtio 1.2, 2.7.5.2).
    #[error("Queue {queue}: chain {head} has more than 2^32 bytes")]
    TooManyBytes { queue: u16, head: u16 },
    /// A buffer is not in guest RAM.
    #[error("Queue {queue}: chain {head} has a buffer at {addr:#x}+{len:#x}, not in guest RAM")]
    BufferOutside {
        queue: u16,
        head: u16,
        addr: u64,
        len: u32,
    },
    /// A device-readable buffer behind a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("Queue {queue}: chain {head} has a readable buffer at {addr:#x} behind a writable one")]
    ReadableAfterWritable { queue: u16, head: u16, addr: u64 },
    /// An indirect table that is empty or not made of whole descriptors (virtio 1.2, 2.7.5.3).
    #[error(
        "Queue {queue}: chain {head} has an indirect table of {len} bytes, not a multiple of 16"
    )]
    IndirectLength { queue: u16, head: u16, len: u32 },
    /// An indirect table that is not in guest RAM.
    #[error(
        "Queue {queue}: chain {head} has an indirect table at {addr:#x}+{len:#x}, not in guest RAM"
    )]
    IndirectOutside {
        queue: u16,
        head: u16,
        addr: u64,
        len: u32,
    },
    /// An indirect descriptor inside an indirect table, or one that is not the last of its chain.
    #[error("Queue {queue}: chain {head} has an indirect descriptor that is nested or has a next")]
    IndirectMisplaced { queue: u16, head: u16 },
    /// A device gave a chain back to another queue than it is from.
    #[error("Queue {queue}: given a chain of queue {of}")]
    WrongQueue { queue: u16, of: u16 },
}
