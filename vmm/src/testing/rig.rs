//! A device under test, with its driver's queues.

use std::time::Duration;

use super::{Buffer, DriverQueue, Guest, Used};
use crate::devices::virtio::{
    ActivateError, Activation, F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_VERSION_1, Faults,
    Interrupt, Saved, VirtioDevice,
};
use crate::sys::reactor::ManualReactor;

/// More batches of events than any honest piece of work takes.
const MAX_TURNS: usize = 20_000;

/// A device, a guest that drives it, and a reactor turned by [`Rig::run`].
#[derive(Debug)]
pub struct Rig<D> {
    /// The device.
    pub device: D,
    /// The guest's memory.
    pub guest: Guest,
    /// The driver's queues, by index.
    pub queues: Vec<DriverQueue>,
    /// Counts the interrupts since the last activation.
    pub interrupt: Interrupt,
    /// Counts the faults since the last activation.
    pub faults: Faults,
    reactor: ManualReactor,
}

impl<D: VirtioDevice> Rig<D> {
    /// An inactive device with a guest of 8 MiB and queues of at most 16 descriptors.
    pub fn new(device: D) -> Self {
        Self::with(device, Guest::new(8 << 20), 16)
    }

    /// An inactive device with a guest and a limit for the sizes of its queues.
    pub fn with(device: D, guest: Guest, max_queue_size: u16) -> Self {
        let mut queues: Vec<DriverQueue> = Vec::new();
        for (index, size) in (0..).zip(device.queue_max_sizes()) {
            let mut queue = DriverQueue::new(&guest, index, size.min(max_queue_size));
            if let Some(other) = queues.get(usize::from(device.bell_of(index))) {
                queue.share_bell(other);
            }
            queues.push(queue);
        }
        Self {
            device,
            guest,
            queues,
            interrupt: Interrupt::recording(),
            faults: Faults::recording(),
            reactor: ManualReactor::new().expect("a reactor"),
        }
    }

    /// All the device offers and the ring features.
    pub fn all_features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_RING_INDIRECT_DESC | F_RING_EVENT_IDX
    }

    /// Activates the device with everything it offers.
    pub fn activate(&mut self) {
        self.activate_with(self.all_features(), 0)
            .expect("activation");
    }

    /// Activates the device with `features`; every queue begins at `position`.
    pub fn activate_with(&mut self, features: u64, position: u16) -> Result<(), ActivateError> {
        let wanted: Vec<u16> = (0..).take(self.queues.len()).collect();
        self.activate_queues(features, position, &wanted)
    }

    /// Activates the device with only the queues in `wanted` made ready.
    pub fn activate_queues(
        &mut self,
        features: u64,
        position: u16,
        wanted: &[u16],
    ) -> Result<(), ActivateError> {
        self.interrupt = Interrupt::recording();
        self.faults = Faults::recording();
        for queue in &mut self.queues {
            queue.reset(features, position);
        }
        let queues = wanted
            .iter()
            .map(|&index| self.queues[usize::from(index)].activate())
            .collect();
        self.device.activate(Activation {
            memory: self.guest.memory().clone(),
            queues,
            features,
            interrupt: self.interrupt.clone(),
            reactor: self.reactor.handle(),
            faults: self.faults.clone(),
        })
    }

    /// Puts `device` in place of the present one, which is held still: it becomes what that one is
    /// and goes on with its queues, for a driver that notices nothing.
    pub fn replace(&mut self, mut device: D, features: u64) -> Result<(), ActivateError> {
        let Saved {
            queues,
            device: state,
        } = self.device.save();
        device.restore(state).expect("a state of its own kind");
        let queues = queues
            .into_iter()
            .map(|(index, position)| self.queues[usize::from(index)].activate_at(position))
            .collect();
        self.device = device;
        self.interrupt = Interrupt::recording();
        self.faults = Faults::recording();
        self.device.activate(Activation {
            memory: self.guest.memory().clone(),
            queues,
            features,
            interrupt: self.interrupt.clone(),
            reactor: self.reactor.handle(),
            faults: self.faults.clone(),
        })
    }

    /// Lets the device work until it is idle; returns the batches of events that took.
    ///
    /// # Panics
    /// When the device doesn't come to rest.
    pub fn run(&self) -> usize {
        for turns in 0..MAX_TURNS {
            if self.turn(Duration::ZERO) == 0 {
                return turns;
            }
        }
        panic!("{} does not become idle", self.device.id());
    }

    /// Lets the device work until `done` says so, waiting for events of other threads.
    ///
    /// # Panics
    /// When it has not come to that after 30 seconds.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let begin = std::time::Instant::now();
        while !done(self) {
            assert!(
                begin.elapsed() < Duration::from_secs(30),
                "it never came to that"
            );
            self.turn(Duration::from_millis(50));
        }
    }

    /// Dispatches one batch of events, waiting for it up to `limit`.
    pub fn turn(&self, limit: Duration) -> usize {
        self.reactor.turn(limit).expect("a reactor that turns")
    }

    /// Submits a chain to queue `index`, notifies if the device asked for it, and runs the device.
    pub fn submit(&mut self, index: u16, buffers: &[Buffer]) -> u16 {
        let queue = &mut self.queues[usize::from(index)];
        let head = queue.submit(buffers);
        queue.kick();
        self.run();
        head
    }

    /// Submits a chain and returns what came back for it.
    ///
    /// # Panics
    /// When nothing came back.
    pub fn exchange(&mut self, index: u16, buffers: &[Buffer]) -> Used {
        let head = self.submit(index, buffers);
        let mut used = None;
        // A disk's I/O is done by the kernel meanwhile.
        self.run_until(|rig| {
            used = rig.used(index);
            used.is_some()
        });
        let used = used.expect("it was waited for");
        assert_eq!(used.head, head);
        used
    }

    /// The next chain returned on queue `index`.
    pub fn used(&mut self, index: u16) -> Option<Used> {
        self.queues[usize::from(index)].used()
    }

    /// Configuration space from `offset`.
    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read_config(offset, &mut data);
        data
    }
}
