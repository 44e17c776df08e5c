mod fill;
mod restore;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::virtio::{DeviceState, QuiesceError, Saved, StateError, block};
use crate::sys::reactor::Reactor;

/// What happened to the device, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Activate { queues: Vec<u16>, features: u64 },
    Reset,
    Quiesce,
    Fill,
    Resume,
    WriteConfig { offset: u64, len: usize },
}

#[derive(Clone, Default)]
struct Log {
    calls: Arc<Mutex<Vec<Call>>>,
    activation: Arc<Mutex<Option<Activation>>>,
}

impl Log {
    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }
}

/// Two queues, feature bits 0 and 40, eight bytes of configuration; needs queue 0.
struct Probe(Log);

const DEVICE_FEATURE_BITS: u64 = 1 | 1 << 40;

impl VirtioDevice for Probe {
    fn id(&self) -> &str {
        "probe0"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![256, 64]
    }

    fn features(&self) -> u64 {
        DEVICE_FEATURE_BITS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::devices::virtio::read_config_bytes(&[1, 2, 3, 4, 5, 6, 7, 8], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let call = Call::WriteConfig {
            offset,
            len: data.len(),
        };
        self.0.calls.lock().unwrap().push(call);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = activation
            .queues
            .iter()
            .map(|queue| queue.index)
            .collect::<Vec<_>>();
        let call = Call::Activate {
            queues: queues.clone(),
            features: activation.features,
        };
        self.0.calls.lock().unwrap().push(call);
        if !queues.contains(&0) {
            return Err(ActivateError::MissingQueue { index: 0 });
        }
        *self.0.activation.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.0.calls.lock().unwrap().push(Call::Reset);
        *self.0.activation.lock().unwrap() = None;
    }

    fn quiesce(&mut self) -> Result<(), QuiesceError> {
        self.0.calls.lock().unwrap().push(Call::Quiesce);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.0.calls.lock().unwrap().push(Call::Resume);
        Ok(())
    }

    fn save(&self) -> Saved {
        let activation = self.0.activation.lock().unwrap();
        let queues = activation.iter().flat_map(|activation| &activation.queues);
        Saved {
            queues: queues.map(|queue| queue.position(0)).collect(),
            device: DeviceState::Rng,
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        assert_eq!(state, DeviceState::Rng);
        Ok(())
    }

    fn config_changed(&self) -> bool {
        true
    }

    fn fill(&mut self, contents: Box<dyn block::Backend>) -> Result<(), block::FillError> {
        self.0.calls.lock().unwrap().push(Call::Fill);
        let device = "probe0".to_owned();
        match contents.size() {
            0 => Err(block::FillError::Nothing { device }),
            _ => Ok(()),
        }
    }
}

struct Fixture {
    transport: MmioTransport,
    log: Log,
    edges: Arc<AtomicUsize>,
    lowered: Arc<AtomicUsize>,
    faults: Arc<Mutex<Vec<(String, String)>>>,
    _reactor: Reactor,
}

impl Fixture {
    fn new() -> Self {
        Self::with_lines(false)
    }

    /// A device whose interrupts are edges, or levels.
    fn with_lines(levels: bool) -> Self {
        let log = Log::default();
        let edges = Arc::new(AtomicUsize::new(0));
        let faults = Arc::new(Mutex::new(Vec::new()));
        let reactor = Reactor::new("test", &crate::devices::virtio::DEVICES).unwrap();
        reactor.begin();
        let (counter, list) = (Arc::clone(&edges), Arc::clone(&faults));
        let lowered = Arc::new(AtomicUsize::new(0));
        let lower = Arc::clone(&lowered);
        let parts = MmioParts {
            memory: GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap(),
            reactor: reactor.handle(),
            raise: Box::new(move || {
                counter.fetch_add(1, Ordering::SeqCst);
            }),
            lower: Box::new(move || {
                lower.fetch_add(1, Ordering::SeqCst);
                levels
            }),
            observer: Arc::new(move |device, reason| {
                list.lock()
                    .unwrap()
                    .push((device.to_owned(), reason.to_owned()));
            }),
        };
        let transport = MmioTransport::new(Box::new(Probe(log.clone())), parts).unwrap();
        Self {
            transport,
            log,
            edges,
            lowered,
            faults,
            _reactor: reactor,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, offset: u64, value: u32) {
        assert!(
            self.transport
                .write(offset, &value.to_le_bytes())
                .is_continue()
        );
    }

    fn accept(&self, features: u64) {
        for (number, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(DRIVER_FEATURES_SELECT, number);
            self.write(DRIVER_FEATURES, word);
        }
    }

    /// Up to FEATURES_OK; answers whether the device agreed.
    fn negotiate(&self, features: u64) -> bool {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(STATUS) & FEATURES_OK != 0
    }

    fn configure_queue(&self, index: u32, size: u32, base: u32) {
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, size);
        for (register, address) in [
            (QUEUE_DESCRIPTORS, base),
            (QUEUE_DRIVER, base + 0x1000),
            (QUEUE_DEVICE, base + 0x2000),
        ] {
            self.write(register, address);
            self.write(register + 4, 0);
        }
        self.write(QUEUE_READY, 1);
    }

    fn start(&self) {
        assert!(self.negotiate(F_VERSION_1));
        self.configure_queue(0, 128, 0x1_0000);
        self.write(STATUS, UP);
    }

    fn active(&self) -> bool {
        self.log.activation.lock().unwrap().is_some()
    }
}

const UP: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn a_driver_finds_and_starts_the_device() {
    let fixture = Fixture::new();
    assert_eq!(fixture.read(MAGIC_VALUE), 0x7472_6976);
    assert_eq!(fixture.read(VERSION), 2);
    assert_eq!(fixture.read(DEVICE_ID), 42);
    fixture.write(DEVICE_FEATURES_SELECT, 0);
    assert_eq!(fixture.read(DEVICE_FEATURES), 1 | 1 << 28 | 1 << 29);
    fixture.write(DEVICE_FEATURES_SELECT, 1);
    assert_eq!(fixture.read(DEVICE_FEATURES), 1 | 1 << 8);
    fixture.write(DEVICE_FEATURES_SELECT, 2);
    assert_eq!(fixture.read(DEVICE_FEATURES), 0);

    assert!(fixture.negotiate(F_VERSION_1 | F_RING_EVENT_IDX | 1));
    for (queue, max) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
        fixture.write(QUEUE_SELECT, queue);
        assert_eq!(fixture.read(QUEUE_SIZE_MAX), max);
        assert_eq!(fixture.read(QUEUE_READY), 0);
    }
    fixture.configure_queue(1, 64, 0x2_0000);
    fixture.configure_queue(0, 256, 0x1_0000);
    assert_eq!(fixture.read(QUEUE_READY), 1);
    fixture.write(STATUS, UP);
    assert_eq!(fixture.read(STATUS), UP);
    let features = F_VERSION_1 | F_RING_EVENT_IDX | 1;
    assert_eq!(
        fixture.log.calls(),
        [Call::Activate {
            queues: vec![0, 1],
            features
        }]
    );
}

#[test]
fn features_that_were_not_offered_or_no_version_1_are_refused() {
    assert!(!Fixture::new().negotiate(0));
    assert!(!Fixture::new().negotiate(F_VERSION_1 | 2));
    assert!(!Fixture::new().negotiate(F_VERSION_1 | 1 << 63));
    assert!(Fixture::new().negotiate(F_VERSION_1 | DEVICE_FEATURE_BITS));
}

#[test]
fn nothing_starts_out_of_order() {
    let skip_features = Fixture::new();
    skip_features.write(STATUS, ACKNOWLEDGE | DRIVER);
    skip_features.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(skip_features.read(STATUS), ACKNOWLEDGE | DRIVER);

    let skip_all = Fixture::new();
    skip_all.write(STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(skip_all.read(STATUS), 0);

    let failed = Fixture::new();
    assert!(failed.negotiate(F_VERSION_1));
    failed.configure_queue(0, 128, 0x1_0000);
    failed.write(STATUS, UP | FAILED);
    assert!(!failed.active());

    let late_features = Fixture::new();
    late_features.start();
    late_features.accept(F_VERSION_1 | 2);
    late_features.write(QUEUE_SELECT, 1);
    late_features.write(QUEUE_READY, 1);
    assert_eq!(late_features.read(QUEUE_READY), 0);
    assert_eq!(late_features.log.calls().len(), 1);
}

#[test]
fn bits_of_the_status_are_never_taken_back_but_by_reset() {
    let fixture = Fixture::new();
    fixture.start();
    fixture.write(STATUS, ACKNOWLEDGE);
    assert_eq!(fixture.read(STATUS), UP);
    // A second DRIVER_OK does not start it again.
    fixture.write(STATUS, UP);
    assert_eq!(fixture.log.calls().len(), 1);

    fixture.write(STATUS, 0);
    assert_eq!(fixture.read(STATUS), 0);
    assert_eq!(fixture.log.calls()[1..], [Call::Reset]);
    fixture.start();
    assert!(fixture.active());
}

#[test]
fn reset_forgets_queues_features_interrupts_and_rings() {
    let fixture = Fixture::new();
    fixture.start();
    fixture
        .log
        .activation
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .interrupt
        .config();
    fixture.write(QUEUE_NOTIFY, 0);
    assert_ne!(fixture.read(INTERRUPT_STATUS), 0);

    fixture.write(STATUS, 0);
    assert_eq!(fixture.read(INTERRUPT_STATUS), 0);
    assert_eq!(fixture.read(QUEUE_READY), 0);
    assert!(!fixture.transport.doorbells()[0].clear().unwrap());
    assert!(fixture.negotiate(F_VERSION_1));
    fixture.write(STATUS, UP);
    assert_eq!(
        fixture.read(STATUS),
        UP | NEEDS_RESET,
        "no queue is left from before"
    );
}

#[test]
fn a_device_that_cannot_start_needs_a_reset_and_the_vm_goes_on() {
    type Configure = fn(&Fixture);
    let cases: [(&str, Configure); 5] = [
        ("left queue 0 unconfigured", |fixture| {
            fixture.configure_queue(1, 64, 0x1_0000)
        }),
        ("QueueNum", |fixture| {
            fixture.configure_queue(0, 100, 0x1_0000)
        }),
        ("QueueNum", |fixture| {
            fixture.configure_queue(0, 0x1_0100, 0x1_0000)
        }),
        ("QueueDesc", |fixture| {
            fixture.configure_queue(0, 128, 0x1_0001)
        }),
        ("Queue refused", |fixture| {
            fixture.configure_queue(0, 128, 0xf_f000)
        }),
    ];
    for (reason, configure) in cases {
        let fixture = Fixture::new();
        assert!(fixture.negotiate(F_VERSION_1));
        configure(&fixture);
        fixture.write(STATUS, UP);
        assert_eq!(fixture.read(STATUS), UP | NEEDS_RESET, "{reason}");
        assert_eq!(fixture.read(INTERRUPT_STATUS), 2, "{reason}");
        assert_eq!(fixture.edges.load(Ordering::SeqCst), 1, "{reason}");
        let faults = fixture.faults.lock().unwrap().clone();
        assert!(
            faults[0].0 == "probe0" && faults[0].1.contains(reason),
            "{faults:?}"
        );
        // A reset makes it whole again.
        fixture.write(STATUS, 0);
        fixture.start();
        assert!(fixture.active());
    }
}

#[test]
fn a_fault_of_the_worker_shows_at_once() {
    let fixture = Fixture::new();
    fixture.start();
    let faults = fixture
        .log
        .activation
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .faults
        .clone();
    let generation = fixture.read(CONFIG_GENERATION);
    faults.needs_reset(&"ring is nonsense");
    assert_eq!(fixture.read(STATUS), UP | NEEDS_RESET);
    assert_eq!(fixture.read(INTERRUPT_STATUS), 2);
    assert_ne!(fixture.read(CONFIG_GENERATION), generation);
    assert_eq!(faults.count(), 1);
    assert_eq!(fixture.faults.lock().unwrap()[0].1, "ring is nonsense");
}

#[test]
fn faults_are_told_ever_more_rarely_and_all_counted() {
    let fixture = Fixture::new();
    fixture.start();
    let faults = fixture
        .log
        .activation
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .faults
        .clone();
    for _ in 0..1000 {
        faults.needs_reset(&"again");
    }
    assert_eq!(faults.count(), 1000);
    assert_eq!(fixture.faults.lock().unwrap().len(), 10);
}

#[test]
fn interrupt_bits_stay_until_they_are_acknowledged() {
    let fixture = Fixture::new();
    fixture.start();
    let interrupt = fixture
        .log
        .activation
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .interrupt
        .clone();
    interrupt.config();
    interrupt.config();
    assert_eq!(fixture.read(INTERRUPT_STATUS), 2);
    assert_eq!(
        fixture.edges.load(Ordering::SeqCst),
        2,
        "every update is followed by an edge"
    );
    fixture.write(INTERRUPT_ACK, 1);
    assert_eq!(fixture.read(INTERRUPT_STATUS), 2);
    fixture.write(INTERRUPT_ACK, 2);
    assert_eq!(fixture.read(INTERRUPT_STATUS), 0);
}

#[test]
fn a_level_goes_low_on_acknowledgement_and_high_again_for_what_is_left() {
    for (levels, edges) in [(false, 2), (true, 3)] {
        let fixture = Fixture::with_lines(levels);
        fixture.start();
        let activation = fixture.log.activation.lock().unwrap();
        let interrupt = activation.as_ref().unwrap().interrupt.clone();
        drop(activation);
        let lowered = || fixture.lowered.load(Ordering::SeqCst);
        let before = lowered();
        interrupt.config();
        interrupt.config();
        fixture.write(INTERRUPT_ACK, 1);
        assert_eq!(fixture.edges.load(Ordering::SeqCst), edges, "one is left");
        fixture.write(INTERRUPT_ACK, 2);
        assert_eq!(lowered() - before, 2);
        assert_eq!(fixture.edges.load(Ordering::SeqCst), edges, "none is left");
    }
}

#[test]
fn notifications_that_exit_ring_the_queue_they_name() {
    let fixture = Fixture::new();
    fixture.write(QUEUE_NOTIFY, 1);
    fixture.write(QUEUE_NOTIFY, 2);
    fixture.write(QUEUE_NOTIFY, u32::MAX);
    let ringing: Vec<_> = fixture
        .transport
        .doorbells()
        .iter()
        .map(|bell| bell.clear().unwrap())
        .collect();
    assert_eq!(ringing, [false, true]);
}

#[test]
fn configuration_takes_every_width_and_registers_only_words() {
    let fixture = Fixture::new();
    let read = |offset, len: usize| {
        let mut data = vec![0xee; len];
        fixture.transport.read(offset, &mut data);
        data
    };
    assert_eq!(read(CONFIG, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(read(CONFIG + 6, 4), [7, 8, 0, 0]);
    assert_eq!(read(CONFIG + 0xe00, 2), [0, 0]);
    assert_eq!(read(MAGIC_VALUE, 1), [0]);
    assert_eq!(read(MAGIC_VALUE, 8), [0; 8]);
    assert_eq!(read(MAGIC_VALUE + 2, 4), [0; 4]);
    // Configuration is the driver's to write only once there is a driver.
    assert!(fixture.transport.write(CONFIG + 4, &[0; 2]).is_continue());
    assert!(fixture.log.calls().is_empty());
    fixture.write(STATUS, ACKNOWLEDGE);
    fixture.write(STATUS, ACKNOWLEDGE | DRIVER);
    assert!(fixture.transport.write(CONFIG + 4, &[0; 2]).is_continue());
    assert_eq!(
        fixture.log.calls(),
        [Call::WriteConfig { offset: 4, len: 2 }]
    );
    // No shared memory region exists: length -1.
    assert_eq!(fixture.read(SHM_FIRST), u32::MAX);
    assert_eq!(fixture.read(SHM_LAST), u32::MAX);
}

/// One access of a driver that knows the registers but no rules.
fn access() -> impl Strategy<Value = (u64, Vec<u8>, bool)> {
    let register = prop_oneof![
        3 => prop::sample::select(vec![
            STATUS, QUEUE_SELECT, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY, DRIVER_FEATURES,
            DRIVER_FEATURES_SELECT, DEVICE_FEATURES_SELECT, INTERRUPT_ACK, QUEUE_DESCRIPTORS,
            QUEUE_DRIVER, QUEUE_DEVICE, QUEUE_DESCRIPTORS + 4,
        ]),
        1 => 0..0x1000u64,
    ];
    let word = prop_oneof![
        0..16u32,
        prop::sample::select(vec![1, 3, 11, 15, 0, 64, 128, 0x1_0000, 0x1_1000, 0x1_2000]),
        any::<u32>(),
    ];
    let data = prop_oneof![
        4 => word.prop_map(|word| word.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..9),
    ];
    (register, data, prop::bool::weighted(0.8))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever a driver does: no panic, no device active that was not started by the rules, no
    /// activation without a reset in between, and a reset always brings everything back.
    #[test]
    fn no_sequence_of_accesses_breaks_the_rules(
        accesses in prop::collection::vec(access(), 0..120),
    ) {
        let fixture = Fixture::new();
        for (offset, data, write) in accesses {
            if write {
                prop_assert!(fixture.transport.write(offset, &data).is_continue());
            } else {
                fixture.transport.read(offset, &mut data.clone());
            }
            let status = fixture.read(STATUS);
            if fixture.active() {
                prop_assert_eq!(status & UP, UP);
            }
            prop_assert!(status & FEATURES_OK == 0 || status & DRIVER != 0);
            prop_assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0);
        }
        let mut started = false;
        for call in fixture.log.calls() {
            match call {
                Call::Activate { features, .. } => {
                    prop_assert!(!started);
                    prop_assert!(features & F_VERSION_1 != 0);
                    prop_assert_eq!(features & !(DEVICE_FEATURE_BITS | TRANSPORT_FEATURES), 0);
                    started = true;
                }
                Call::Reset => started = false,
                Call::WriteConfig { .. } | Call::Quiesce | Call::Fill | Call::Resume => {}
            }
        }
        fixture.write(STATUS, 0);
        prop_assert_eq!(fixture.read(STATUS), 0);
        fixture.start();
        prop_assert!(fixture.active());
    }
}
