//! A balloon as its transport sees it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::handle::Shared;
use super::worker::{Queues, Worker};
use super::{
    BalloonConfig, F_DEFLATE_ON_OOM, F_MUST_TELL_HOST, F_PAGE_REPORTING, F_STATS_VQ, Handle, Host,
    PAGE, TYPE,
};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::memory::GuestMemory;
use crate::sys::reactor::Running;

/// Linux wants room for 32 pages at once to report any.
const QUEUE_SIZE: u16 = 128;
/// The offset of `actual`, the one field a driver writes (virtio 1.2, 5.5.4).
const ACTUAL: usize = 4;

type HostOf = dyn Fn(&GuestMemory) -> Host + Send;

/// A virtio balloon.
pub struct Balloon {
    config: BalloonConfig,
    shared: Arc<Shared>,
    host_of: Box<HostOf>,
    running: Option<Running<Worker>>,
}

impl Balloon {
    /// Makes a balloon with target 0.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(config: BalloonConfig) -> io::Result<Self> {
        Self::on_host(config, Box::new(Host::of))
    }

    pub(super) fn on_host(config: BalloonConfig, host_of: Box<HostOf>) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(config.limit)?);
        Ok(Self {
            config,
            shared,
            host_of,
            running: None,
        })
    }

    /// A handle to the balloon, good for all its life.
    pub fn handle(&self) -> Handle {
        Handle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// `struct virtio_balloon_config` (virtio 1.2, 5.5.4); its last two fields go with features
    /// that are not offered.
    fn config_space(&self) -> [u8; 16] {
        let mut space = [0; 16];
        let target = self.shared.target.load(Ordering::SeqCst);
        let actual = self.shared.actual.load(Ordering::SeqCst);
        space[..4].copy_from_slice(&target.to_le_bytes());
        space[ACTUAL..ACTUAL + 4].copy_from_slice(&actual.to_le_bytes());
        space
    }
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> &str {
        "balloon0"
    }

    fn device_type(&self) -> u32 {
        TYPE
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        let optional = [self.config.stats, self.config.page_reporting];
        let queues = 2 + optional.iter().filter(|offered| **offered).count();
        vec![QUEUE_SIZE; queues]
    }

    fn features(&self) -> u64 {
        let offer = |offered: bool, feature: u64| if offered { feature } else { 0 };
        F_MUST_TELL_HOST
            | offer(self.config.stats, F_STATS_VQ)
            | offer(self.config.deflate_on_oom, F_DEFLATE_ON_OOM)
            | offer(self.config.page_reporting, F_PAGE_REPORTING)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.shared.actual.load(Ordering::SeqCst).to_le_bytes();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let place = usize::try_from(at)
                .ok()
                .and_then(|at| at.checked_sub(ACTUAL));
            if let Some(place) = place.and_then(|place| actual.get_mut(place)) {
                *place = *byte;
            }
        }
        self.shared
            .actual
            .store(u32::from_le_bytes(actual), Ordering::SeqCst);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let features = activation.features;
        let has = |feature: u64| features & feature != 0;
        // Queues are numbered by what was negotiated: a driver leaves no gap for one it does not
        // use.
        let mut next = 0;
        let mut take = |negotiated: bool| {
            negotiated.then(|| {
                next += 1;
                activation.require_queue(next - 1)
            })
        };
        let queues = Queues {
            inflate: take(true).transpose()?,
            deflate: take(true).transpose()?,
            stats: take(has(F_STATS_VQ)).transpose()?,
            reporting: take(has(F_PAGE_REPORTING)).transpose()?,
        };
        let host = (self.host_of)(&activation.memory);
        // A driver that may use a page before it tells could have live data in a host page that
        // looks complete; where the pages are the same size it can't hurt anybody.
        let may_discard = host.page == PAGE || has(F_MUST_TELL_HOST);
        let interrupt = activation.interrupt.clone();
        let reactor = activation.reactor.clone();
        let worker = Worker::new(
            activation,
            queues,
            host,
            may_discard,
            Arc::clone(&self.shared),
        );
        self.running = Some(reactor.spawn(worker)?);
        self.shared.set_interrupt(Some(interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.set_interrupt(None);
        self.running = None;
        // The driver's balloon ends with the driver; the target is the host's and stays.
        self.shared.actual.store(0, Ordering::SeqCst);
    }
}
