//! A balloon as its transport sees it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::handle::Shared;
use super::reclaim::Pages;
use super::state::BalloonState;
use super::worker::{Queues, Worker};
use super::{
    BalloonConfig, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_MUST_TELL_HOST, F_PAGE_POISON,
    F_PAGE_REPORTING, F_STATS_VQ, Handle, Host, PAGE, TYPE,
};
use crate::devices::virtio::active::{self, Active};
use crate::devices::virtio::{
    ActivateError, Activation, DeviceState, QuiesceError, Saved, StateError, VirtioDevice,
    read_config_bytes,
};
use crate::memory::GuestMemory;

/// Linux wants room for 32 pages at once to report any.
const QUEUE_SIZE: u16 = 128;
/// The offsets of what a driver writes (virtio 1.2, 5.5.4).
const ACTUAL: usize = 4;
const POISON: usize = 12;

type HostOf = dyn Fn(&GuestMemory) -> Host + Send;

/// A virtio balloon.
pub struct Balloon {
    config: BalloonConfig,
    shared: Arc<Shared>,
    host_of: Box<HostOf>,
    running: Option<Active<Worker>>,
    /// What the driver that is to go on had.
    restored: Option<BalloonState>,
}

impl Balloon {
    /// Makes a balloon with target 0 for a guest with `memory` bytes.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(config: BalloonConfig, memory: u64) -> io::Result<Self> {
        Self::on_host(config, memory, Box::new(Host::of))
    }

    pub(super) fn on_host(
        config: BalloonConfig,
        memory: u64,
        host_of: Box<HostOf>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(memory.saturating_sub(config.floor))?);
        Ok(Self {
            config,
            shared,
            host_of,
            running: None,
            restored: None,
        })
    }

    /// A handle to the balloon, good for all its life.
    pub fn handle(&self) -> Handle {
        Handle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// `struct virtio_balloon_config` (virtio 1.2, 5.5.4).
    fn config_space(&self) -> [u8; 16] {
        let mut space = [0; 16];
        let target = self.shared.target.load(Ordering::SeqCst);
        let actual = self.shared.actual.load(Ordering::SeqCst);
        space[..4].copy_from_slice(&target.to_le_bytes());
        let poison = self.shared.poison.load(Ordering::SeqCst);
        space[ACTUAL..ACTUAL + 4].copy_from_slice(&actual.to_le_bytes());
        space[8..12].copy_from_slice(&self.shared.hints.command().to_le_bytes());
        space[POISON..POISON + 4].copy_from_slice(&poison.to_le_bytes());
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

    /// A megabyte of pages for each ring, or a report every other second.
    fn busy_queues(&self) -> Range<u16> {
        0..0
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        let BalloonConfig {
            stats,
            free_page_hint,
            page_reporting,
            ..
        } = self.config;
        let optional = [stats, free_page_hint, page_reporting];
        let queues = 2 + optional.iter().filter(|offered| **offered).count();
        vec![QUEUE_SIZE; queues]
    }

    fn features(&self) -> u64 {
        let offer = |offered: bool, feature: u64| if offered { feature } else { 0 };
        F_MUST_TELL_HOST
            | F_PAGE_POISON
            | offer(self.config.free_page_hint, F_FREE_PAGE_HINT)
            | offer(self.config.stats, F_STATS_VQ)
            | offer(self.config.deflate_on_oom, F_DEFLATE_ON_OOM)
            | offer(self.config.page_reporting, F_PAGE_REPORTING)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (field, at) in [(&self.shared.actual, ACTUAL), (&self.shared.poison, POISON)] {
            let mut bytes = field.load(Ordering::SeqCst).to_le_bytes();
            let before = bytes;
            for (offset, byte) in (offset..=u64::MAX).zip(data) {
                let place = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| offset.checked_sub(at));
                if let Some(place) = place.and_then(|place| bytes.get_mut(place)) {
                    *place = *byte;
                }
            }
            if bytes != before {
                field.store(u32::from_le_bytes(bytes), Ordering::SeqCst);
                self.shared.wake();
            }
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let restored = self.restored.take();
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
            hints: take(has(F_FREE_PAGE_HINT)).transpose()?,
            reporting: take(has(F_PAGE_REPORTING)).transpose()?,
        };
        let host = (self.host_of)(&activation.memory);
        // A driver that may use a page before it tells could have live data in a host page that
        // looks complete; where the pages are the same size it can't hurt anybody.
        let may_discard = host.page == PAGE || has(F_MUST_TELL_HOST);
        let interrupt = activation.interrupt.clone();
        let reactor = activation.reactor.clone();
        let pages = Pages::new(&activation.memory, host, may_discard, has(F_PAGE_POISON));
        let mut worker = Worker::new(activation, queues, pages, Arc::clone(&self.shared));
        if let Some(state) = restored {
            worker.put_in(&state.inside);
            self.shared.poison.store(state.poison, Ordering::SeqCst);
            self.shared.set_actual(state.actual);
        }
        self.running = Some(Active::spawn(reactor, worker)?);
        self.shared.set_interrupt(Some(interrupt));
        self.shared.hints.set_possible(has(F_FREE_PAGE_HINT));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.set_interrupt(None);
        self.running = None;
        self.restored = None;
        // The driver's balloon ends with the driver; the target is the host's and stays.
        self.shared.hints.set_possible(false);
        self.shared.poison.store(0, Ordering::SeqCst);
        self.shared.set_actual(0);
    }

    fn quiesce(&mut self) -> Result<(), QuiesceError> {
        active::quiesce(&mut self.running, "balloon0")
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        Ok(active::resume(&mut self.running)?)
    }

    fn save(&self) -> Saved {
        let worker = self.running.as_ref().and_then(Active::still);
        let restored = self.restored.as_ref();
        let inactive = || {
            let inside = restored.map(|state| state.inside.clone());
            (Vec::new(), inside.unwrap_or_default())
        };
        let (queues, inside) = worker.map_or_else(inactive, Worker::save);
        Saved {
            queues,
            device: DeviceState::Balloon(BalloonState {
                offers: self.config,
                target: self.shared.target.load(Ordering::SeqCst),
                actual: self.shared.actual.load(Ordering::SeqCst),
                poison: self.shared.poison.load(Ordering::SeqCst),
                inside,
            }),
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Balloon(state) = state else {
            return Err(StateError::kind(&state, "balloon"));
        };
        state.check(self.shared.limit)?;
        self.shared.target.store(state.target, Ordering::SeqCst);
        self.shared.poison.store(state.poison, Ordering::SeqCst);
        self.shared.set_actual(state.actual);
        self.restored = Some(state);
        Ok(())
    }
}
