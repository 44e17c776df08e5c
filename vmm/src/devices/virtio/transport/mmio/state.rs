//! A transport and its device as data.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::registers::QueueRegisters;
use super::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, MmioTransport, NEEDS_RESET, Report, State,
};
use crate::devices::virtio::block::{Backend, FillError};
use crate::devices::virtio::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use crate::devices::virtio::{DeviceState, Position, QuiesceError, StateError};

/// All bits of the device status.
const STATUS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;

/// What a driver finds at its device's window, and how far both are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// The device's id, such as `block0`.
    pub id: String,
    /// Device ID of virtio 1.2, 5.
    pub device_type: u32,
    /// Device status.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub generation: u32,
    /// Features offered to the driver.
    pub offered: u64,
    /// Features it has accepted.
    pub accepted: u64,
    /// DeviceFeaturesSel.
    pub offered_page: u32,
    /// DriverFeaturesSel.
    pub accepted_page: u32,
    /// QueueSel.
    pub selected: u32,
    /// All queues, from 0.
    pub queues: Vec<QueueState>,
    /// The device itself.
    pub device: DeviceState,
}

/// A queue: its registers, and how far the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// QueueReady.
    pub ready: bool,
    /// QueueNum.
    pub size: u32,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub driver: u64,
    /// Address of the used ring.
    pub device: u64,
    /// How far the device is.
    pub position: Position,
}

impl MmioTransport {
    /// Holds the device still; see [`VirtioDevice::quiesce`](super::VirtioDevice::quiesce). One that
    /// is broken is still by itself.
    ///
    /// # Errors
    /// As the device.
    pub fn quiesce(&self) -> Result<(), QuiesceError> {
        self.state().device.quiesce()
    }

    /// Lets the device go on.
    pub fn resume(&self) {
        self.go_on(&mut self.state());
    }

    fn go_on(&self, state: &mut State) {
        // It waits for a reset, and would only meet the same fault once more.
        if self.status() & NEEDS_RESET != 0 {
            return;
        }
        if let Err(error) = state.device.resume() {
            state.faults.needs_reset(&Report(&error));
        }
    }

    /// Gives a disk of no sectors what it has from now on, whether or not its driver is at work, and
    /// tells a driver of the capacity (virtio 1.2, 5.2.5). The device must not be held still by
    /// somebody else.
    ///
    /// # Errors
    /// As [`VirtioDevice::fill`](super::VirtioDevice::fill).
    pub fn fill(&self, contents: Box<dyn Backend>) -> Result<(), FillError> {
        let mut state = self.state();
        state.device.quiesce()?;
        let filled = state.device.fill(contents);
        self.go_on(&mut state);
        filled?;
        // Also one that isn't up yet: it may have read the capacity before. Told before the device
        // is let go of, so that whoever reads half of the old one and half of the new finds another
        // generation (2.5).
        if self.status() & DRIVER != 0 {
            self.interrupt().config();
        }
        Ok(())
    }

    /// What driver and device are, while the vCPUs and the device are held still.
    pub fn save(&self) -> TransportState {
        let state = self.state();
        let saved = state.device.save();
        let position = |index: usize| {
            let mut queues = saved.queues.iter();
            let found = queues.find(|(queue, _)| usize::from(*queue) == index);
            found.map(|(_, position)| *position).unwrap_or_default()
        };
        let queues = state.queues.iter().enumerate();
        TransportState {
            id: state.device.id().to_owned(),
            device_type: state.device.device_type(),
            status: self.status(),
            interrupt_status: self.lines.interrupt_status.load(Ordering::SeqCst),
            generation: self.lines.generation.load(Ordering::SeqCst),
            offered: state.offered,
            accepted: state.accepted,
            offered_page: state.offered_page,
            accepted_page: state.accepted_page,
            selected: state.selected,
            queues: queues
                .map(|(index, queue)| queue.save(position(index)))
                .collect(),
            device: saved.device.clone(),
        }
    }

    /// Makes a fresh transport and its device what others were. Nothing works yet:
    /// [`start_restored`](Self::start_restored) follows.
    ///
    /// # Errors
    /// A state that this device can't have; it can come from anybody.
    pub fn restore(&self, saved: TransportState) -> Result<(), StateError> {
        let mut state = self.state();
        saved.check(&state)?;
        let TransportState { queues, device, .. } = saved;
        state.device.restore(device)?;
        (state.accepted, state.offered_page) = (saved.accepted, saved.offered_page);
        (state.accepted_page, state.selected) = (saved.accepted_page, saved.selected);
        for (registers, queue) in state.queues.iter_mut().zip(queues) {
            *registers = QueueRegisters::restored(registers.max_size, queue);
        }
        let lines = &self.lines;
        lines.status.store(saved.status, Ordering::SeqCst);
        lines.generation.store(saved.generation, Ordering::SeqCst);
        let pending = saved.interrupt_status;
        lines.interrupt_status.store(pending, Ordering::SeqCst);
        Ok(())
    }

    /// Starts the device of a restored transport, if its driver was up, and tells the driver what
    /// it may have missed.
    pub fn start_restored(&self) {
        let mut state = self.state();
        let status = self.status();
        if status & DRIVER_OK == 0 || status & NEEDS_RESET != 0 {
            return;
        }
        let changed = state.device.config_changed();
        if let Err(error) = self.activate(&mut state) {
            state.faults.needs_reset(&Report(&error));
            return;
        }
        // An edge that was on its way when the VM was saved is in nobody's state.
        self.lines.repeat();
        if changed {
            self.interrupt().config();
        }
    }
}

impl TransportState {
    /// Whether the transport's device can be this.
    fn check(&self, of: &State) -> Result<(), StateError> {
        let id = of.device.id();
        if self.id != id {
            return Err(StateError::value("Device's id", &self.id, id));
        }
        if self.device_type != of.device.device_type() {
            let expected = of.device.device_type();
            return Err(StateError::value(
                "Device's type",
                self.device_type,
                expected,
            ));
        }
        // Its driver has read them, and may rely on any.
        if self.offered != of.offered {
            let (found, expected) = (hex(self.offered), hex(of.offered));
            return Err(StateError::value("Features offered", found, expected));
        }
        if self.accepted & !self.offered != 0 {
            let expected = format!("among {}", hex(self.offered));
            return Err(StateError::value(
                "Features accepted",
                hex(self.accepted),
                expected,
            ));
        }
        let up = self.status & DRIVER_OK != 0;
        let ready = self.status & (ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status & !STATUS != 0 || (up && ready != ACKNOWLEDGE | DRIVER | FEATURES_OK) {
            let found = format!("{:#x}", self.status);
            return Err(StateError::value("Device status", found, "a driver's way"));
        }
        if self.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            let found = self.interrupt_status;
            return Err(StateError::value("Interrupt status", found, "0 to 3"));
        }
        if self.queues.len() != of.queues.len() {
            let (found, expected) = (self.queues.len(), of.queues.len());
            return Err(StateError::value("Number of queues", found, expected));
        }
        Ok(())
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}
