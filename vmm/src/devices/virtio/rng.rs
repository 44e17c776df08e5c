//! virtio-rng (virtio 1.2, 5.4): entropy for the guest.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::active::{self, Active};
use super::metrics::Counter;
use super::queue::Chain;
use super::{
    ActivateError, Activation, ActiveQueue, DeviceState, Faults, Interrupt, QuiesceError, Saved,
    StateError, VirtioDevice,
};
use crate::sys::random;
use crate::sys::reactor::{self, Control, Readiness};

/// Device ID (virtio 1.2, 5.4.1).
const TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 64;
const QUEUE: usize = 0;
/// The most bytes for one request; a driver that wants more asks again.
const MAX_REQUEST: u64 = 64 << 10;
/// Requests for each notification: at most 1 MiB of entropy.
const BUDGET: usize = 16;

/// Fills a buffer with entropy, or fails.
pub type Source = dyn Fn(&mut [u8]) -> io::Result<()> + Send + Sync;

/// What an entropy device counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes given to the guest.
    pub bytes: Counter,
    /// Requests the source failed to answer; they went back empty.
    pub failures: Counter,
}

/// An entropy device.
pub struct Rng {
    source: Arc<Source>,
    metrics: Arc<Metrics>,
    running: Option<Active<Worker>>,
}

impl Rng {
    /// A device that gives what `source` gives.
    pub fn new(source: Arc<Source>) -> Self {
        Self {
            source,
            metrics: Arc::default(),
            running: None,
        }
    }

    /// A device that gives the host's entropy.
    pub fn of_host() -> Self {
        Self::new(Arc::new(random::fill))
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rng")
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        "rng0"
    }

    fn device_type(&self) -> u32 {
        TYPE
    }

    /// A guest asks for entropy when it boots, and rarely after that.
    fn busy_queues(&self) -> Range<u16> {
        0..0
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let worker = Worker {
            queue: activation.require_queue(0)?,
            source: Arc::clone(&self.source),
            metrics: Arc::clone(&self.metrics),
            interrupt: activation.interrupt,
            faults: activation.faults,
        };
        self.running = Some(Active::spawn(activation.reactor, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn quiesce(&mut self) -> Result<(), QuiesceError> {
        active::quiesce(&mut self.running, "rng0")
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        Ok(active::resume(&mut self.running)?)
    }

    fn save(&self) -> Saved {
        let worker = self.running.as_ref().and_then(Active::still);
        Saved {
            queues: worker
                .map(|worker| worker.queue.position(0))
                .into_iter()
                .collect(),
            device: DeviceState::Rng,
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Rng => Ok(()),
            other => Err(StateError::kind(&other, "rng")),
        }
    }
}

struct Worker {
    queue: ActiveQueue,
    source: Arc<Source>,
    metrics: Arc<Metrics>,
    interrupt: Interrupt,
    faults: Faults,
}

impl reactor::Worker for Worker {
    fn start(&mut self, control: &mut Control<'_>) -> io::Result<()> {
        control.listen(&self.queue.doorbell, QUEUE)?;
        // A driver may have asked before DRIVER_OK.
        self.queue.doorbell.ring()
    }

    fn ready(&mut self, control: &mut Control<'_>, _token: usize, _readiness: Readiness) {
        let Self {
            queue,
            source,
            metrics,
            interrupt,
            faults,
        } = self;
        let answer = |chain: &Chain| match give(source.as_ref(), chain) {
            Ok(bytes) => {
                metrics.bytes.add(bytes.into());
                bytes
            }
            Err(error) => {
                metrics.failures.add(1);
                tracing::debug!(%error, "No entropy for the guest");
                0
            }
        };
        if let Err(fault) = queue.serve(interrupt, BUDGET, answer) {
            control.remove(QUEUE);
            faults.needs_reset(&fault);
        }
    }
}

/// Fills the writable buffers, up to the limit; returns how many bytes that were.
fn give(source: &Source, chain: &Chain) -> io::Result<u32> {
    let mut writer = chain.writer();
    let mut part = [0; 4096];
    let mut given: u32 = 0;
    let mut left = chain.writable_len().min(MAX_REQUEST);
    while left > 0 {
        let len = left.min(part.len() as u64);
        let Some(here) = part.get_mut(..len as usize) else {
            break;
        };
        source(here)?;
        writer.write_all(here).map_err(io::Error::other)?;
        given += len as u32;
        left -= len;
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::{any, proptest};

    use super::*;
    use crate::testing::{Buffer, Guest, Rig, suite};

    /// Gives 0, 1, 2, … and then again 0, 1, 2, ….
    fn counting() -> Rng {
        let next = Mutex::new(0_u8);
        Rng::new(Arc::new(move |bytes| {
            let mut next = next.lock().unwrap();
            for byte in bytes {
                *byte = *next;
                *next = next.wrapping_add(1);
            }
            Ok(())
        }))
    }

    fn prove(rig: &mut Rig<Rng>) {
        let room = rig.guest.room(64);
        assert_eq!(rig.exchange(0, &[room]).written, 64);
        let bytes = rig.guest.contents(room);
        assert!(
            bytes
                .windows(2)
                .all(|pair| pair[1] == pair[0].wrapping_add(1)),
            "{bytes:?}"
        );
    }

    #[test]
    fn passes_the_suite_of_all_devices() {
        suite::run(counting, prove);
    }

    #[test]
    fn gives_the_entropy_of_the_host() {
        let mut rig = Rig::new(Rng::of_host());
        rig.activate();
        let (first, second) = (rig.guest.room(5000).split(3), rig.guest.room(5000));
        assert_eq!(rig.exchange(0, &[first.0, first.1]).written, 5000);
        assert_eq!(rig.exchange(0, &[second]).written, 5000);
        let bytes = rig.guest.contents(Buffer {
            len: 5000,
            ..first.0
        });
        assert_ne!(bytes, rig.guest.contents(second));
        assert!(
            !bytes.windows(16).any(|part| part == [0xaa; 16]),
            "some were left out"
        );
        assert_eq!(rig.device.metrics().bytes.get(), 10_000);
        assert_eq!(rig.interrupt.used_count(), 2);
    }

    #[test]
    fn one_request_gets_at_most_64_kib() {
        let mut rig = Rig::with(counting(), Guest::new(8 << 20), 16);
        rig.activate();
        let room = rig.guest.room(1 << 20);
        assert_eq!(rig.exchange(0, &[room]).written, 64 << 10);
        let bytes = rig.guest.contents(room);
        assert!(
            bytes[..64 << 10]
                .windows(2)
                .all(|pair| pair[1] == pair[0].wrapping_add(1))
        );
        assert!(bytes[64 << 10..].iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn readable_buffers_stay_as_they_are() {
        let mut rig = Rig::new(counting());
        rig.activate();
        let text = rig.guest.put(b"text");
        let room = rig.guest.room(2);
        assert_eq!(rig.exchange(0, &[text, room]).written, 2);
        assert_eq!(rig.exchange(0, &[text]).written, 0);
        assert_eq!(rig.guest.contents(text), b"text");
        assert_eq!(rig.guest.contents(room), [0, 1]);
    }

    #[test]
    fn a_failing_source_gives_nothing() {
        let mut rig = Rig::new(Rng::new(Arc::new(|_| Err(io::Error::other("dry")))));
        rig.activate();
        let room = rig.guest.room(8);
        assert_eq!(rig.exchange(0, &[room]).written, 0);
        assert_eq!(rig.device.metrics().failures.get(), 1);
        assert_eq!(rig.faults.count(), 0);
    }

    proptest! {
        #[test]
        fn no_driver_hurts_it(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            suite::survives(counting(), &bytes, prove);
        }
    }
}
