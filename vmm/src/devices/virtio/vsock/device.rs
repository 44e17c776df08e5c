//! Identity, features and configuration space.

use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::metrics::Metrics;
use super::state::VsockState;
use super::worker::Worker;
use super::{DEVICE_ID, F_STREAM, MIN_CID, QUEUE_SIZES, VsockConfig, VsockError};
use crate::devices::virtio::active::{self, Active};
use crate::devices::virtio::{
    ActivateError, Activation, DeviceState, QuiesceError, Saved, StateError, VirtioDevice,
    read_config_bytes,
};

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    listener: UnixListener,
    metrics: Arc<Metrics>,
    /// The driver that is to go on has to forget its connections.
    moved: bool,
    running: Option<Active<Worker>>,
}

impl Vsock {
    /// Makes an inactive device.
    ///
    /// # Errors
    /// A reserved context id, or a listener that can't be set to non-blocking.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let VsockConfig { cid, listener } = config;
        if cid < MIN_CID || cid == u32::MAX {
            return Err(VsockError::Cid { cid });
        }
        listener
            .set_nonblocking(true)
            .map_err(VsockError::Listener)?;
        Ok(Self {
            cid,
            listener,
            metrics: Arc::default(),
            moved: false,
            running: None,
        })
    }

    /// What the device counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> &str {
        "vsock0"
    }

    fn device_type(&self) -> u32 {
        DEVICE_ID
    }

    /// Not that of events.
    fn busy_queues(&self) -> Range<u16> {
        0..2
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `guest_cid` (virtio 1.2, 5.10.4); its upper half is reserved and zero.
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.running = None;
        let reactor = activation.reactor.clone();
        let listener = self.listener.try_clone()?;
        let metrics = Arc::clone(&self.metrics);
        let moved = std::mem::take(&mut self.moved);
        let worker = Worker::new(self.cid, listener, metrics, activation, moved)?;
        self.running = Some(Active::spawn(reactor, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        // Waits for the worker; its sockets close with it.
        self.running = None;
        self.moved = false;
    }

    fn quiesce(&mut self) -> Result<(), QuiesceError> {
        active::quiesce(&mut self.running, "vsock0")
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        Ok(active::resume(&mut self.running)?)
    }

    fn save(&self) -> Saved {
        let worker = self.running.as_ref().and_then(Active::still);
        Saved {
            queues: worker.map(Worker::positions).unwrap_or_default(),
            device: DeviceState::Vsock(VsockState { cid: self.cid }),
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Vsock(state) = state else {
            return Err(StateError::kind(&state, "vsock"));
        };
        state.check()?;
        // Whatever its id was: the host's ends of its connections are not here.
        self.moved = true;
        Ok(())
    }
}
