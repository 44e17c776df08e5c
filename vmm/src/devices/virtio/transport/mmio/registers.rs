//! A queue's registers, as the driver fills them before the queue is live.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::state::QueueState;
use super::{QUEUE_DESCRIPTORS, QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_READY, QUEUE_SIZE};
use crate::devices::virtio::{ActivateError, Position};

/// What the driver wrote, unchecked.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) ready: bool,
    size: u32,
    descriptors: u64,
    driver: u64,
    device: u64,
    /// Where the device begins: at 0 but for one that goes on from a snapshot.
    position: Position,
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        let size = u32::from(max_size);
        Self {
            max_size,
            ready: false,
            size,
            descriptors: 0,
            driver: 0,
            device: 0,
            position: Position::default(),
        }
    }

    /// The registers as they were; as unchecked as a driver's.
    pub(super) fn restored(max_size: u16, state: QueueState) -> Self {
        Self {
            max_size,
            ready: state.ready,
            size: state.size,
            descriptors: state.descriptors,
            driver: state.driver,
            device: state.device,
            position: state.position,
        }
    }

    pub(super) fn save(&self, position: Position) -> QueueState {
        QueueState {
            ready: self.ready,
            size: self.size,
            descriptors: self.descriptors,
            driver: self.driver,
            device: self.device,
            position,
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        const HIGH: u64 = 4;
        match offset {
            QUEUE_READY => self.ready = value == 1,
            // 4.2.2.2: the driver does not touch a queue that is ready.
            _ if self.ready => {}
            QUEUE_SIZE => self.size = value,
            QUEUE_DESCRIPTORS => set_low(&mut self.descriptors, value),
            offset if offset == QUEUE_DESCRIPTORS + HIGH => set_high(&mut self.descriptors, value),
            QUEUE_DRIVER => set_low(&mut self.driver, value),
            offset if offset == QUEUE_DRIVER + HIGH => set_high(&mut self.driver, value),
            QUEUE_DEVICE => set_low(&mut self.device, value),
            offset if offset == QUEUE_DEVICE + HIGH => set_high(&mut self.device, value),
            _ => {}
        }
    }

    /// The queue these registers describe; whether its rings lie in guest RAM is checked by
    /// `Virtqueue::new`.
    pub(super) fn to_queue(self) -> Result<Queue, ActivateError> {
        let refused =
            |register: &'static str, value: u64| ActivateError::Register { register, value };
        let mut queue = Queue::new(self.max_size)
            .map_err(|_| refused("QueueNumMax", u64::from(self.max_size)))?;
        let size =
            u16::try_from(self.size).map_err(|_| refused("QueueNum", u64::from(self.size)))?;
        queue
            .try_set_size(size)
            .map_err(|_| refused("QueueNum", u64::from(size)))?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(|_| refused("QueueDesc", self.descriptors))?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .map_err(|_| refused("QueueDriver", self.driver))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .map_err(|_| refused("QueueDevice", self.device))?;
        queue.set_next_avail(self.position.avail);
        queue.set_next_used(self.position.used);
        queue.set_ready(true);
        Ok(queue)
    }
}

fn set_low(field: &mut u64, value: u32) {
    *field = (*field & !u64::from(u32::MAX)) | u64::from(value);
}

fn set_high(field: &mut u64, value: u32) {
    *field = (*field & u64::from(u32::MAX)) | (u64::from(value) << 32);
}
