//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).

mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::interrupt::{DRIVER_OK, FaultObserver, Faults, Interrupt, Lines, NEEDS_RESET};
use super::super::queue::Virtqueue;
use super::super::{
    ActivateError, Activation, ActiveQueue, F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_VERSION_1,
    VirtioDevice,
};
use crate::devices::bus::BusDevice;
use crate::exit::Exit;
use crate::memory::GuestMemory;
use crate::sys::doorbell::Doorbell;
use crate::sys::reactor::ReactorHandle;
use registers::QueueRegisters;
pub use state::{QueueState, TransportState};

/// Offset of QueueNotify in a device's window: a 32-bit write of a queue's number rings its doorbell.
pub const QUEUE_NOTIFY: u64 = 0x50;

// Registers (virtio 1.2, 4.2.2).
const MAGIC_VALUE: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const SHM_FIRST: u64 = 0xb0;
const SHM_LAST: u64 = 0xbc;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// Any value; this one reads "smvm".
const VENDOR: u32 = 0x6d76_6d73;

// Device status (virtio 1.2, 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const FEATURES_OK: u32 = 8;
const FAILED: u32 = 128;

const TRANSPORT_FEATURES: u64 = F_VERSION_1 | F_RING_INDIRECT_DESC | F_RING_EVENT_IDX;

/// What a transport needs besides its device.
pub struct MmioParts {
    /// Guest RAM, handed to the device when it is activated.
    pub memory: GuestMemory,
    /// Where the device's worker runs.
    pub reactor: ReactorHandle,
    /// Raises the device's interrupt.
    pub raise: Box<dyn Fn() + Send + Sync>,
    /// Lowers it when the driver has acknowledged; answers whether it is a level, which is to be
    /// raised again for news that are left.
    pub lower: Box<dyn Fn() -> bool + Send + Sync>,
    /// Hears of the device's faults.
    pub observer: Arc<FaultObserver>,
}

impl fmt::Debug for MmioParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioParts").finish_non_exhaustive()
    }
}

/// One device in its window. Notifications, interrupt status and device status are words without a
/// lock; all else is rare and takes one.
pub struct MmioTransport {
    /// Shared with the worker: status words and the interrupt.
    lines: Arc<Lines>,
    doorbells: Vec<Arc<Doorbell>>,
    busy: Range<u16>,
    state: Mutex<State>,
}

struct State {
    device: Box<dyn VirtioDevice>,
    parts: Parts,
    faults: Faults,
    offered: u64,
    accepted: u64,
    offered_page: u32,
    accepted_page: u32,
    selected: u32,
    queues: Vec<QueueRegisters>,
}

struct Parts {
    memory: GuestMemory,
    reactor: ReactorHandle,
}

impl MmioTransport {
    /// A transport for `device`, reset.
    ///
    /// # Errors
    /// When a doorbell cannot be made.
    pub fn new(device: Box<dyn VirtioDevice>, parts: MmioParts) -> std::io::Result<Self> {
        let lines = Lines::new(parts.raise, parts.lower);
        let sizes = device.queue_max_sizes();
        let mut doorbells: Vec<Arc<Doorbell>> = Vec::with_capacity(sizes.len());
        for (index, _) in (0..).zip(&sizes) {
            let shared = doorbells.get(usize::from(device.bell_of(index)));
            let doorbell =
                shared.map_or_else(|| Doorbell::new().map(Arc::new), |it| Ok(it.clone()));
            doorbells.push(doorbell?);
        }
        let busy = device.busy_queues();
        let interrupt = Interrupt::new(Arc::clone(&lines));
        let faults = Faults::new(device.id(), interrupt, parts.observer);
        let state = State {
            offered: device.features() | TRANSPORT_FEATURES,
            accepted: 0,
            offered_page: 0,
            accepted_page: 0,
            selected: 0,
            queues: sizes.into_iter().map(QueueRegisters::new).collect(),
            device,
            parts: Parts {
                memory: parts.memory,
                reactor: parts.reactor,
            },
            faults,
        };
        Ok(Self {
            lines,
            doorbells,
            busy,
            state: Mutex::new(state),
        })
    }

    /// The doorbell of each queue, in index order.
    pub fn doorbells(&self) -> &[Arc<Doorbell>] {
        &self.doorbells
    }

    /// Those of them that the hypervisor should ring, by the numbers of their queues.
    pub fn busy_doorbells(&self) -> impl Iterator<Item = (u32, &Doorbell)> {
        let all = (0..).zip(&self.doorbells);
        let busy = all.filter(|(index, _)| self.busy.contains(index));
        busy.map(|(index, doorbell)| (u32::from(index), &**doorbell))
    }

    /// Stops the device for good; the VM's vCPUs must have stopped.
    pub fn shut_down(&self) {
        self.state().device.reset();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self) -> Interrupt {
        Interrupt::new(Arc::clone(&self.lines))
    }

    fn status(&self) -> u32 {
        self.lines.status.load(Ordering::SeqCst)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => return MAGIC,
            VERSION => return 2,
            VENDOR_ID => return VENDOR,
            INTERRUPT_STATUS => return self.lines.interrupt_status.load(Ordering::SeqCst),
            STATUS => return self.status(),
            CONFIG_GENERATION => return self.lines.generation.load(Ordering::SeqCst),
            // A region that does not exist has length and base -1 (virtio 1.2, 4.2.2, SHMLen).
            SHM_FIRST..=SHM_LAST => return u32::MAX,
            _ => {}
        }
        let state = self.state();
        match offset {
            DEVICE_ID => state.device.device_type(),
            DEVICE_FEATURES => page(state.offered, state.offered_page),
            QUEUE_SIZE_MAX => state
                .selected_queue()
                .map_or(0, |queue| u32::from(queue.max_size)),
            QUEUE_READY => state
                .selected_queue()
                .map_or(0, |queue| u32::from(queue.ready)),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            // Only reached where the hypervisor does not ring the doorbell itself.
            QUEUE_NOTIFY => {
                let index = usize::try_from(value).unwrap_or(usize::MAX);
                if let Some(doorbell) = self.doorbells.get(index) {
                    // Fails only without a descriptor behind it.
                    let _ = doorbell.ring();
                }
                return;
            }
            INTERRUPT_ACK => {
                self.lines.acknowledge(value);
                return;
            }
            _ => {}
        }
        let mut state = self.state();
        let status = self.status();
        match offset {
            STATUS => self.write_status(&mut state, status, value),
            DEVICE_FEATURES_SELECT => state.offered_page = value,
            DRIVER_FEATURES_SELECT => state.accepted_page = value,
            QUEUE_SELECT => state.selected = value,
            // Features are fixed once FEATURES_OK is set (virtio 1.2, 3.1.1).
            DRIVER_FEATURES if status & (DRIVER | FEATURES_OK) == DRIVER => {
                state.accept(value);
            }
            // Queues are fixed once the driver is up.
            _ if status & (DRIVER | DRIVER_OK | NEEDS_RESET) == DRIVER => {
                if let Some(queue) = state.selected_queue_mut() {
                    queue.write(offset, value);
                }
            }
            _ => tracing::debug!(offset, value, status, "Register write ignored"),
        }
    }

    /// The driver's way through the status bits (virtio 1.2, 3.1.1). Bits are only ever added, in
    /// order; 0 resets.
    fn write_status(&self, state: &mut State, status: u32, value: u32) {
        if value == 0 {
            self.reset(state);
            return;
        }
        let added = value & !status;
        let mut now = status | (added & (ACKNOWLEDGE | FAILED));
        if added & DRIVER != 0 && now & ACKNOWLEDGE != 0 {
            now |= DRIVER;
        }
        if added & FEATURES_OK != 0 && now & DRIVER != 0 && state.features_acceptable() {
            now |= FEATURES_OK;
        }
        let broken = now & (FAILED | NEEDS_RESET) != 0;
        let start = added & DRIVER_OK != 0 && now & FEATURES_OK != 0 && !broken;
        if start {
            now |= DRIVER_OK;
        }
        // The worker may set NEEDS_RESET at any time: add bits, never store.
        self.lines.status.fetch_or(now, Ordering::SeqCst);
        if start && let Err(error) = self.activate(state) {
            state.faults.needs_reset(&Report(&error));
        }
    }

    fn activate(&self, state: &mut State) -> Result<(), ActivateError> {
        let event_idx = state.accepted & F_RING_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for ((index, registers), doorbell) in (0..).zip(&state.queues).zip(&self.doorbells) {
            if !registers.ready {
                continue;
            }
            let memory = state.parts.memory.clone();
            let queue = Virtqueue::new(index, memory, registers.to_queue()?, event_idx)?;
            queues.push(ActiveQueue {
                index,
                queue,
                doorbell: Arc::clone(doorbell),
            });
        }
        state.device.activate(Activation {
            memory: state.parts.memory.clone(),
            queues,
            features: state.accepted,
            interrupt: self.interrupt(),
            reactor: state.parts.reactor.clone(),
            faults: state.faults.clone(),
        })
    }

    fn reset(&self, state: &mut State) {
        // The worker is gone when this returns, so nobody else touches the words below.
        state.device.reset();
        state.accepted = 0;
        state.offered_page = 0;
        state.accepted_page = 0;
        state.selected = 0;
        for queue in &mut state.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        for doorbell in &self.doorbells {
            // A ring of the past is not for the next driver.
            let _ = doorbell.clear();
        }
        self.lines.acknowledge(u32::MAX);
        self.lines.status.store(0, Ordering::SeqCst);
    }
}

impl State {
    fn selected_queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.selected).ok()?)
    }

    fn selected_queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::try_from(self.selected).ok()?)
    }

    fn accept(&mut self, value: u32) {
        let (mask, bits) = match self.accepted_page {
            0 => (u64::from(u32::MAX), u64::from(value)),
            1 => (u64::from(u32::MAX) << 32, u64::from(value) << 32),
            _ => return,
        };
        self.accepted = (self.accepted & !mask) | bits;
    }

    /// A subset of what was offered, and no legacy driver (virtio 1.2, 6.1).
    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.state().device.read_config(offset, data);
            return;
        }
        // 4.2.2.2: registers are read and written as aligned 32-bit words.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset).to_le_bytes()
            }
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit> {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            // A driver may write configuration only after it has found the device (3.1.1).
            if self.status() & DRIVER != 0 {
                self.state().device.write_config(offset, data);
            }
        } else if let (Ok(word), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
        ControlFlow::Continue(())
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// Word `number` of a 64-bit field.
fn page(bits: u64, number: u32) -> u32 {
    match number {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

/// An error with its sources, on one line.
struct Report<'a>(&'a dyn std::error::Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
