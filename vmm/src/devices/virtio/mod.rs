//! Virtio devices. A device implements [`VirtioDevice`] and never learns which transport shows it to
//! the guest: the transport owns the status machine, feature words and queue registers, and hands
//! over configured queues in an [`Activation`].

mod active;
pub mod balloon;
pub mod block;
pub mod console;
mod interrupt;
pub mod metrics;
pub mod queue;
pub mod rng;
mod state;
#[cfg(test)]
mod tests;
pub mod transport;
pub mod vsock;

use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use interrupt::{FaultObserver, Faults, Interrupt};
pub use state::{DeviceState, Position, Positions, QuiesceError, Saved, StateError};

use crate::jail::{Filter, Rule, When, allow, allow_if, calls};
use crate::memory::GuestMemory;
use crate::sys::doorbell::Doorbell;
use crate::sys::reactor::{self, ReactorHandle};
use crate::sys::threads;
use queue::{RingFault, Virtqueue};

/// The thread of devices that never block: streams, the vsock's listener and sockets, entropy.
pub(crate) const DEVICES: Filter = Filter {
    name: "device",
    tables: &[threads::EVERY, reactor::WAITING, STREAMS],
};

/// What streams and sockets take.
pub(crate) const STREAMS: &[Rule] = &[
    allow(calls::SYS_readv),
    allow(calls::SYS_writev),
    allow(calls::SYS_recvfrom),
    allow(calls::SYS_sendto),
    // Of the vsock's listener, the only socket that listens.
    allow(calls::SYS_accept4),
    allow(calls::SYS_shutdown),
    allow(calls::SYS_poll),
    allow(calls::SYS_ppoll),
    // Blocking or not.
    allow_if(calls::SYS_ioctl, &[When::Is(1, libc::FIONBIO as u32)]),
    allow_if(
        calls::SYS_fcntl,
        &[
            When::Is(1, libc::F_GETFL as u32),
            When::Is(1, libc::F_SETFL as u32),
        ],
    ),
];

/// `VIRTIO_F_INDIRECT_DESC` (virtio 1.2, 6): offered by the transport for every device.
pub const F_RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (virtio 1.2, 6): offered by the transport for every device.
pub const F_RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (virtio 1.2, 6): offered for every device, and required of every driver.
pub const F_VERSION_1: u64 = 1 << 32;

/// What a device is to its transport.
///
/// Life: made by its constructor, activated when the driver sets DRIVER_OK, reset by the driver or by
/// the VM's end, perhaps activated again. An active one may be held still, saved and resumed; a fresh
/// one may be restored before it is activated. All calls come one at a time.
pub trait VirtioDevice: Send {
    /// Name for logs and metrics, such as `block0`; unique in its VM.
    fn id(&self) -> &str;

    /// Device ID of virtio 1.2, 5.
    fn device_type(&self) -> u32;

    /// The largest size of each queue, in index order; powers of two.
    fn queue_max_sizes(&self) -> Vec<u16>;

    /// The queue whose doorbell rings for `queue`: itself, or one before it that shares its own with
    /// others that have little to tell.
    fn bell_of(&self, queue: u16) -> u16 {
        queue
    }

    /// Queues whose doorbells ring often enough to be worth what it takes to have the hypervisor ring
    /// them: each costs KVM a grace period (SRCU) when a VM is made. The others ring by an exit.
    fn busy_queues(&self) -> Range<u16> {
        0..u16::MAX
    }

    /// The device's own feature bits; the transport adds `VERSION_1` and the ring features.
    fn features(&self) -> u64;

    /// Reads device configuration space at any offset and width; reads 0 where there is nothing.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space; ignored where nothing is writable.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready: start working on the queues.
    ///
    /// # Errors
    /// The transport then sets NEEDS_RESET; the VM goes on without the device.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops all work and forgets the queues. May be called on an inactive device.
    fn reset(&mut self);

    /// Holds an active device still, between two requests: it touches neither guest memory nor its
    /// backend until it is resumed or reset. An inactive device is still by itself.
    ///
    /// # Errors
    /// The device's thread is gone.
    fn quiesce(&mut self) -> Result<(), QuiesceError>;

    /// Lets a device that is held still go on.
    ///
    /// # Errors
    /// As [`activate`](Self::activate).
    fn resume(&mut self) -> Result<(), ActivateError>;

    /// What a device that is held still, or inactive, is. Requests it has taken and not answered are
    /// not of it: a restored device takes them anew.
    fn save(&self) -> Saved;

    /// Makes a device that was never active what another was when it was saved; activation follows
    /// if that one was active. `state` may be anybody's.
    ///
    /// # Errors
    /// A state that this device can't have.
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError>;

    /// Whether, after [`restore`](Self::restore), configuration space reads differently from what the
    /// driver may have read before.
    fn config_changed(&self) -> bool {
        false
    }

    /// Gives a disk of no sectors, held still or inactive, what it has from now on.
    ///
    /// # Errors
    /// A device that is no disk, a disk that has something already, or contents that are nothing.
    fn fill(&mut self, contents: Box<dyn block::Backend>) -> Result<(), block::FillError> {
        drop(contents);
        let device = self.id().to_owned();
        Err(block::FillError::NoDisk { device })
    }
}

/// All a device needs while it is active.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The queues the driver made ready, in index order.
    pub queues: Vec<ActiveQueue>,
    /// Feature bits both sides agreed on, the transport's included.
    pub features: u64,
    /// How the driver is told of used buffers and configuration changes.
    pub interrupt: Interrupt,
    /// Where the device's worker runs.
    pub reactor: ReactorHandle,
    /// Where the device reports what it cannot go on from.
    pub faults: Faults,
}

impl Activation {
    /// Takes queue `index` out, if the driver made it ready.
    pub fn take_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        let place = self.queues.iter().position(|queue| queue.index == index)?;
        Some(self.queues.remove(place))
    }

    /// Takes queue `index` out.
    ///
    /// # Errors
    /// [`ActivateError::MissingQueue`] when the driver did not make it ready.
    pub fn require_queue(&mut self, index: u16) -> Result<ActiveQueue, ActivateError> {
        self.take_queue(index)
            .ok_or(ActivateError::MissingQueue { index })
    }
}

/// A queue the driver made ready, with the doorbell it rings.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The queue's number on its device.
    pub index: u16,
    /// The ring itself.
    pub queue: Virtqueue,
    /// Rung by the driver's notification.
    pub doorbell: Arc<Doorbell>,
}

impl ActiveQueue {
    /// Where a restored device goes on that is to take the last `held` chains anew.
    pub(crate) fn position(&self, held: usize) -> (u16, Position) {
        (self.index, self.queue.position(held))
    }
}

/// Why a device could not start working.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set DRIVER_OK without a queue the device cannot do without.
    #[error("Driver left queue {index} unconfigured")]
    MissingQueue {
        /// The queue's number.
        index: u16,
    },
    /// A register of a queue holds what no queue can have.
    #[error("Driver left {value:#x} in {register}")]
    Register {
        /// The register's name in virtio 1.2, 4.2.2.
        register: &'static str,
        /// Its value.
        value: u64,
    },
    /// A queue's rings are not usable.
    #[error("Queue refused")]
    Ring(#[from] RingFault),
    /// The worker or what it needs could not be had.
    #[error("Worker did not start")]
    Worker(#[from] io::Error),
}

/// Copies what `config` has at `offset` into `data` and zeroes the rest: the body of most
/// [`VirtioDevice::read_config`].
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let source = config.get(start..).unwrap_or(&[]);
    let (here, beyond) = data.split_at_mut(source.len().min(data.len()));
    here.copy_from_slice(&source[..here.len()]);
    beyond.fill(0);
}
