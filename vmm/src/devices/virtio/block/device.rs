//! A disk as its transport sees it.

use std::sync::Arc;

use super::requests::Requests;
use super::state::BlockState;
use super::wire::{Disk, ID_LEN, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::worker::Worker;
use super::{Backend, BlockConfig, BlockError, FillError, Metrics};
use crate::devices::virtio::active::Active;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceState, QuiesceError, Saved, StateError, VirtioDevice,
    read_config_bytes,
};
use crate::sys::ring::{Ring, Rings};

/// Device ID (virtio 1.2, 5.2.1).
const TYPE: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Buffers a request may have besides header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// What is cheapest to deallocate: whole blocks of common file systems, in sectors.
const DISCARD_ALIGNMENT: u32 = 8;

// Feature bits (virtio 1.2, 5.2.3).
pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// A virtio disk.
#[derive(Debug)]
pub struct Block {
    id: String,
    disk: Disk,
    metrics: Arc<Metrics>,
    /// The driver that is to go on found another size.
    resized: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Inactive(Box<(Requests, Option<Ring>)>),
    Active(Active<Worker>),
    /// The backend went with a reactor that ended before the disk was reset.
    Lost,
}

impl Block {
    /// Makes a disk. It works on the reactor it is activated with, where its I/O blocks: give each
    /// disk a reactor of its own. Where the host has io_uring, several requests of a disk made of
    /// [`parts`](super::Backend::parts) are done at once.
    ///
    /// # Errors
    /// A serial number that is too long.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        Self::with_rings(config, &mut Rings::OnDemand)
    }

    /// The same, with a ring of these if there is one.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_rings(config: BlockConfig, rings: &mut Rings) -> Result<Self, BlockError> {
        let ring = ring(&config, rings);
        let BlockConfig {
            id,
            backend,
            read_only,
            serial,
        } = config;
        let mut padded = [0; ID_LEN];
        match padded.get_mut(..serial.len()) {
            Some(place) if !serial.contains('\0') => place.copy_from_slice(serial.as_bytes()),
            _ => return Err(BlockError::Serial { serial }),
        }
        let disk = Disk {
            sectors: backend.size() / SECTOR,
            read_only,
        };
        let metrics = Arc::default();
        let requests = Requests {
            backend,
            disk,
            serial: padded,
            write_through: false,
            metrics: Arc::clone(&metrics),
        };
        Ok(Self {
            id,
            disk,
            metrics,
            resized: false,
            state: State::Inactive(Box::new((requests, ring))),
        })
    }

    /// The disk's counters.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4).
    fn config_space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // num_queues; of meaning only with VIRTIO_BLK_F_MQ.
        put(34, &1_u16.to_le_bytes());
        if !self.disk.read_only {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            // write_zeroes_may_unmap
            put(56, &[1]);
        }
        space
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        TYPE
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        let writing = if self.disk.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        always | writing
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The one writable field, `writeback`, goes with VIRTIO_BLK_F_CONFIG_WCE.
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let queue = activation.require_queue(0)?;
        let (mut requests, ring) = match std::mem::replace(&mut self.state, State::Lost) {
            State::Inactive(parts) => *parts,
            State::Active(_) | State::Lost => {
                return Err(std::io::Error::other("The disk's backend is lost").into());
            }
        };
        // Without FLUSH the driver has no way to ask: be a write-through cache (5.2.6.2).
        requests.write_through = activation.features & F_FLUSH == 0;
        let (interrupt, faults) = (activation.interrupt, activation.faults);
        let worker = Worker::new(queue, requests, ring, interrupt, faults);
        self.state = State::Active(Active::spawn(activation.reactor, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Active(active) => match active.stop_with(Worker::drain) {
                Ok(worker) => State::Inactive(Box::new(worker.into_parts())),
                Err(error) => {
                    tracing::error!(device = self.id, %error, "The disk's backend is lost");
                    State::Lost
                }
            },
            other => other,
        };
    }

    fn quiesce(&mut self) -> Result<(), QuiesceError> {
        match &mut self.state {
            State::Active(active) => active
                .quiesce_with(Worker::drain)
                .map_err(|_| QuiesceError {
                    device: self.id.clone(),
                }),
            State::Inactive(_) | State::Lost => Ok(()),
        }
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        match &mut self.state {
            State::Active(active) => Ok(active.resume()?),
            State::Inactive(_) | State::Lost => Ok(()),
        }
    }

    fn save(&self) -> Saved {
        let worker = match &self.state {
            State::Active(active) => active.still(),
            State::Inactive(_) | State::Lost => None,
        };
        Saved {
            queues: worker.map(Worker::position).into_iter().collect(),
            device: DeviceState::Block(BlockState {
                sectors: self.disk.sectors,
                read_only: self.disk.read_only,
            }),
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(state) = state else {
            return Err(StateError::kind(&state, "block"));
        };
        state.check(self.disk)?;
        self.resized = state.sectors != self.disk.sectors;
        Ok(())
    }

    fn config_changed(&self) -> bool {
        self.resized
    }

    fn fill(&mut self, contents: Box<dyn Backend>) -> Result<(), FillError> {
        let device = self.id.clone();
        let sectors = contents.size() / SECTOR;
        if self.disk.sectors != 0 {
            let sectors = self.disk.sectors;
            return Err(FillError::NotEmpty { device, sectors });
        }
        if sectors == 0 {
            return Err(FillError::Nothing { device });
        }
        let requests = match &mut self.state {
            State::Inactive(parts) => Some(&mut parts.0),
            State::Active(active) => active.still_mut().map(Worker::requests_mut),
            State::Lost => None,
        };
        // It has no ring: there was nothing to make one for.
        let requests = requests.ok_or(QuiesceError { device })?;
        self.disk.sectors = sectors;
        requests.disk = self.disk;
        requests.backend = contents;
        self.metrics.fills.add(1);
        Ok(())
    }
}

/// The kernel's way to do several requests at once, if the backend and the host have one.
fn ring(config: &BlockConfig, rings: &mut Rings) -> Option<Ring> {
    let files: Vec<_> = config
        .backend
        .parts()
        .iter()
        .map(|part| &part.file)
        .collect();
    // An empty disk leaves its ring to another: what it is filled with, a ring made now knows not.
    if files.is_empty() || config.backend.size() < SECTOR {
        return None;
    }
    match rings.take(&files) {
        Ok(ring) => Some(ring),
        Err(error) => {
            let device = &config.id;
            tracing::info!(device, %error, "No io_uring: the disk does one request at a time");
            None
        }
    }
}
