//! Identity, features and configuration space.

use std::ops::Range;
use std::sync::Arc;

use super::handle::Shared;
use super::port::Port;
use super::state::ConsoleState;
use super::worker::Worker;
use super::{
    CONTROL_TRANSMIT, ConsoleConfig, ConsoleError, DEVICE_ID, F_MULTIPORT, F_SIZE, Handle,
    MAX_PORTS, RECEIVE_SIZE, SHARED, TRANSMIT_SIZE, bell_of,
};
use crate::devices::virtio::active::{self, Active};
use crate::devices::virtio::{
    ActivateError, Activation, DeviceState, QuiesceError, Saved, StateError, VirtioDevice,
    read_config_bytes,
};
use crate::sys::doorbell::Doorbell;

/// The device; what the host does with its ports goes through a [`Handle`].
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    max_ports: u32,
    /// What the worker is to go on from.
    restored: Option<ConsoleState>,
    running: Option<Active<Worker>>,
}

impl Console {
    /// Makes an inactive console.
    ///
    /// # Errors
    /// A number of ports that can't be, or no descriptor left for the doorbell.
    pub fn new(config: ConsoleConfig) -> Result<Self, ConsoleError> {
        let ConsoleConfig {
            ports,
            max_ports,
            events,
        } = config;
        if !(1..=MAX_PORTS).contains(&max_ports) || ports.len() > max_ports as usize {
            return Err(ConsoleError::Ports {
                max_ports,
                named: ports.len(),
            });
        }
        let configured = ports.len();
        let mut names = ports.into_iter().map(|port| port.name);
        let ports = (0..max_ports as usize)
            .map(|port| Port::new(names.next().unwrap_or_default(), port < configured))
            .collect();
        let doorbell = Doorbell::new().map_err(ConsoleError::Doorbell)?;
        let shared = Arc::new(Shared::new(ports, doorbell, events));
        Ok(Self {
            shared,
            max_ports,
            restored: None,
            running: None,
        })
    }

    /// The host's way to the ports.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> &str {
        "console0"
    }

    fn device_type(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        // One pair for each port and one for control messages.
        (0..=self.max_ports)
            .flat_map(|_| [RECEIVE_SIZE, TRANSMIT_SIZE])
            .collect()
    }

    fn bell_of(&self, queue: u16) -> u16 {
        bell_of(queue)
    }

    /// Those of ports 1 to 3. Control messages are few, and port 0 is what Linux takes for a terminal.
    fn busy_queues(&self) -> Range<u16> {
        CONTROL_TRANSMIT + 1..SHARED
    }

    fn features(&self) -> u64 {
        F_SIZE | F_MULTIPORT
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (cols, rows) = self
            .shared
            .lock()
            .ports
            .first()
            .and_then(Port::size)
            .unwrap_or((0, 0));
        // `struct virtio_console_config` (virtio 1.2, 5.3.4), without emerg_wr, which is not offered.
        let mut config = [0; 8];
        config[..2].copy_from_slice(&cols.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..].copy_from_slice(&self.max_ports.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let restored = self.restored.take();
        self.reset();
        let reactor = activation.reactor.clone();
        let mut worker = Worker::new(Arc::clone(&self.shared), self.max_ports, activation)?;
        if let Some(state) = restored {
            worker.restore(&state);
        }
        self.running = Some(Active::spawn(reactor, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.restored = None;
        // Waits for the worker, so that nothing of it comes after this.
        if self.running.take().is_some() {
            self.shared.disconnect();
        }
    }

    fn quiesce(&mut self) -> Result<(), QuiesceError> {
        active::quiesce(&mut self.running, "console0")
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        Ok(active::resume(&mut self.running)?)
    }

    fn save(&self) -> Saved {
        let worker = self.running.as_ref().and_then(Active::still);
        let (queues, control, taken) = match (worker, &self.restored) {
            (Some(worker), _) => worker.save(),
            (None, Some(state)) => {
                let taken = state.ports.iter().map(|port| port.taken);
                (Vec::new(), state.control, taken.collect())
            }
            (None, None) => Default::default(),
        };
        let taken = taken.into_iter().chain(std::iter::repeat(0));
        let table = self.shared.lock();
        let ports = table.ports.iter().zip(taken);
        Saved {
            queues,
            device: DeviceState::Console(ConsoleState {
                ports: ports.map(|(port, taken)| port.save(taken)).collect(),
                control,
            }),
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(state) = state else {
            return Err(StateError::kind(&state, "console"));
        };
        state.check(self.max_ports)?;
        let mut table = self.shared.lock();
        for (port, state) in table.ports.iter_mut().zip(&state.ports) {
            port.restore(state.clone());
        }
        drop(table);
        self.restored = Some(state);
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Handles may outlive the device: they must not wait for it.
        self.reset();
    }
}
