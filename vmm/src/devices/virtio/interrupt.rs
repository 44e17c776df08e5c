//! How a device speaks to its driver: interrupts, and the one way a fault takes.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::queue::{RingFault, Virtqueue};

/// InterruptStatus bit 0 (virtio 1.2, 4.2.2): a used buffer.
pub(super) const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: a configuration change.
pub(super) const CONFIG_CHANGE: u32 = 2;
/// `DRIVER_OK` of the device status (virtio 1.2, 2.1).
pub(super) const DRIVER_OK: u32 = 4;
/// `DEVICE_NEEDS_RESET` of the device status.
pub(super) const NEEDS_RESET: u32 = 64;

/// What the transport and the device's worker both touch: words, no locks.
pub(super) struct Lines {
    /// InterruptStatus as the driver reads it.
    pub(super) interrupt_status: AtomicU32,
    /// ConfigGeneration.
    pub(super) generation: AtomicU32,
    /// Device status.
    pub(super) status: AtomicU32,
    raise: Box<dyn Fn() + Send + Sync>,
    lower: Box<dyn Fn() -> bool + Send + Sync>,
    used_raised: AtomicU64,
    config_raised: AtomicU64,
}

impl Lines {
    pub(super) fn new(
        raise: Box<dyn Fn() + Send + Sync>,
        lower: Box<dyn Fn() -> bool + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self {
            interrupt_status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            status: AtomicU32::new(0),
            raise,
            lower,
            used_raised: AtomicU64::new(0),
            config_raised: AtomicU64::new(0),
        })
    }

    /// Raises the interrupt once more if the driver has not acknowledged all of it.
    pub(super) fn repeat(&self) {
        if self.interrupt_status.load(Ordering::SeqCst) != 0 {
            (self.raise)();
        }
    }

    /// Every status update is followed by a pulse: the line may be shared and is edge-triggered, so
    /// an edge left out because the bit was still set could be the one the driver waits for.
    fn signal(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::SeqCst);
        (self.raise)();
    }

    /// The driver has seen `causes`. A level goes low before the status is looked at again: of a
    /// cause that comes meanwhile, one of the two sides raises it.
    pub(super) fn acknowledge(&self, causes: u32) {
        self.interrupt_status.fetch_and(!causes, Ordering::SeqCst);
        if (self.lower)() && self.interrupt_status.load(Ordering::SeqCst) != 0 {
            (self.raise)();
        }
    }
}

/// Tells the driver of used buffers and configuration changes.
#[derive(Clone)]
pub struct Interrupt {
    lines: Arc<Lines>,
}

impl Interrupt {
    pub(super) fn new(lines: Arc<Lines>) -> Self {
        Self { lines }
    }

    /// An interrupt that only counts.
    #[cfg(any(test, feature = "testing"))]
    pub fn recording() -> Self {
        Self::new(Lines::new(Box::new(|| ()), Box::new(|| false)))
    }

    /// Interrupts for used buffers if the driver asked for it; answers whether it did.
    ///
    /// # Errors
    /// The queue's own, when the driver's part of the ring cannot be read.
    pub fn used(&self, queue: &mut Virtqueue) -> Result<bool, RingFault> {
        let wanted = queue.should_notify()?;
        if wanted {
            self.lines.used_raised.fetch_add(1, Ordering::Relaxed);
            self.lines.signal(USED_BUFFER);
        }
        Ok(wanted)
    }

    /// Interrupts because the device's configuration changed. Call it after the change can be read.
    pub fn config(&self) {
        self.lines.generation.fetch_add(1, Ordering::SeqCst);
        self.lines.config_raised.fetch_add(1, Ordering::Relaxed);
        self.lines.signal(CONFIG_CHANGE);
    }

    /// How many interrupts were raised for used buffers.
    pub fn used_count(&self) -> u64 {
        self.lines.used_raised.load(Ordering::Relaxed)
    }

    /// How many interrupts were raised for configuration changes.
    pub fn config_count(&self) -> u64 {
        self.lines.config_raised.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt")
            .field("used", &self.used_count())
            .field("config", &self.config_count())
            .finish_non_exhaustive()
    }
}

/// Called with the device's id and the reason of a fault.
pub type FaultObserver = dyn Fn(&str, &str) + Send + Sync;

/// Where a device reports what it cannot go on from. The device then leaves its queues alone until
/// the driver resets it; the VM goes on.
#[derive(Clone)]
pub struct Faults {
    device: Arc<str>,
    interrupt: Interrupt,
    count: Arc<AtomicU64>,
    observer: Arc<FaultObserver>,
}

impl Faults {
    pub(super) fn new(device: &str, interrupt: Interrupt, observer: Arc<FaultObserver>) -> Self {
        Self {
            device: device.into(),
            interrupt,
            count: Arc::new(AtomicU64::new(0)),
            observer,
        }
    }

    /// Faults that are only counted.
    #[cfg(any(test, feature = "testing"))]
    pub fn recording() -> Self {
        Self::new("test", Interrupt::recording(), Arc::new(|_, _| ()))
    }

    /// Marks the device as broken (virtio 1.2, 2.1.2), tells a driver that is up, counts and logs.
    pub fn needs_reset(&self, reason: &dyn Display) {
        let lines = &self.interrupt.lines;
        let before = lines.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        if before & DRIVER_OK != 0 {
            self.interrupt.config();
        }
        // A guest can reset and break a device as fast as it likes: report at 1, 2, 4, 8, …
        if count.is_power_of_two() {
            let reason = reason.to_string();
            tracing::warn!(device = %self.device, count, reason, "Device needs a reset");
            (self.observer)(&self.device, &reason);
        }
    }

    /// How many faults were reported.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("device", &self.device)
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}
