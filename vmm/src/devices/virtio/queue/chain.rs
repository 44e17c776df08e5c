//! A descriptor chain, read and checked.

use vm_memory::GuestAddress;

use super::walk::Layout;
use super::{Reader, Writer};
use crate::memory::GuestMemory;

/// One buffer of a chain; never empty, always within guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first guest address.
    pub addr: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// A request of the driver: readable buffers first, then writable ones (virtio 1.2, 2.7.4.2).
///
/// It goes back through [`Virtqueue::complete`](super::Virtqueue::complete) or
/// [`Virtqueue::undo_pop`](super::Virtqueue::undo_pop). To drop it while its queue lives is to lose
/// the driver's buffer, and panics in tests, unless the queue is broken or gone.
#[derive(Debug)]
pub struct Chain {
    memory: GuestMemory,
    queue: u16,
    head: u16,
    /// The queue's position after this chain was popped.
    position: u16,
    segments: Vec<Segment>,
    layout: Layout,
    #[cfg(any(test, feature = "testing"))]
    watch: Watch,
}

impl Chain {
    pub(super) fn new(
        memory: GuestMemory,
        queue: u16,
        head: u16,
        position: u16,
        segments: Vec<Segment>,
        layout: Layout,
        #[cfg(any(test, feature = "testing"))] watch: Watch,
    ) -> Self {
        Self {
            memory,
            queue,
            head,
            position,
            segments,
            layout,
            #[cfg(any(test, feature = "testing"))]
            watch,
        }
    }

    /// The index of the first descriptor, which names the chain to the driver.
    pub fn head(&self) -> u16 {
        self.head
    }

    pub(super) fn queue(&self) -> u16 {
        self.queue
    }

    pub(super) fn position(&self) -> u16 {
        self.position
    }

    /// The memory the buffers lie in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.layout.readable_len
    }

    /// Bytes the device may write; up to 2^32.
    pub fn writable_len(&self) -> u64 {
        self.layout.writable_len
    }

    /// The readable buffers, in order.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.layout.readable).unwrap_or(&[])
    }

    /// The writable buffers, in order.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.layout.readable..).unwrap_or(&[])
    }

    /// Reads the readable buffers from their beginning.
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(&self.memory, self.readable(), self.readable_len())
    }

    /// Writes the writable buffers from their beginning.
    pub fn writer(&self) -> Writer<'_> {
        Writer::new(&self.memory, self.writable(), self.writable_len())
    }

    /// Gives the storage back; the chain has reached its end.
    pub(super) fn release(mut self) -> Vec<Segment> {
        #[cfg(any(test, feature = "testing"))]
        {
            self.watch = Watch::released();
        }
        std::mem::take(&mut self.segments)
    }
}

/// Knows whether chains of a queue may be dropped: it is broken or gone.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Debug, Default)]
pub(super) struct Watch(std::sync::Arc<std::sync::atomic::AtomicBool>);

#[cfg(any(test, feature = "testing"))]
impl Watch {
    fn released() -> Self {
        Self(std::sync::Arc::new(true.into()))
    }

    pub(super) fn release(&self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    fn is_released(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[cfg(any(test, feature = "testing"))]
impl Drop for super::Virtqueue {
    fn drop(&mut self) {
        self.watch.release();
    }
}

#[cfg(any(test, feature = "testing"))]
impl Drop for Chain {
    fn drop(&mut self) {
        assert!(
            self.watch.is_released() || std::thread::panicking(),
            "chain {} of queue {} was dropped, neither completed nor put back",
            self.head,
            self.queue
        );
    }
}
