//! Devices as a guest sees them: windows of registers, behind which it may do as it likes.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::hostile::{Script, spoil};
use super::{Buffer, DriverQueue, Guest, Used};
use crate::devices::bus::BusDevice;
use crate::devices::virtio::transport::mmio::{MmioParts, MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::{F_VERSION_1, VirtioDevice};
use crate::sys::reactor::ManualReactor;

// Registers (virtio 1.2, 4.2.2) and status bits (2.1), as a driver knows them.
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const QUEUE_ADDRESSES: [u64; 3] = [0x80, 0x90, 0xa0];
const CONFIG: u64 = 0x100;
const ACKNOWLEDGE_DRIVER: u32 = 1 | 2;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 64;

/// More batches of events than any honest piece of work takes.
const MAX_TURNS: usize = 20_000;
/// Descriptors of the driver's queues.
const MAX_SIZE: u16 = 16;

/// Devices on one reactor that is turned by hand. Each has guest memory of its own, so that what it
/// is made to write can't be the other devices' queues.
#[derive(Debug)]
pub struct Board {
    reactor: ManualReactor,
    windows: Vec<Window>,
}

/// One device behind its registers, and its driver's queues.
struct Window {
    guest: Guest,
    transport: MmioTransport,
    queues: Vec<DriverQueue>,
    interrupts: Arc<AtomicU64>,
    /// Memory for what is made up.
    data: u64,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("transport", &self.transport)
            .finish_non_exhaustive()
    }
}

impl Board {
    /// These devices, reset; RAM is in two places, the first not at address 0.
    pub fn new(devices: Vec<Box<dyn VirtioDevice>>) -> Self {
        let reactor = ManualReactor::new().expect("a reactor");
        let windows = devices
            .into_iter()
            .map(|device| Window::new(device, &reactor))
            .collect();
        Self { reactor, windows }
    }

    /// The memory in front of a device.
    pub fn guest(&self, device: usize) -> Guest {
        self.windows[device].guest.clone()
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// Lets the devices work until they are idle.
    ///
    /// # Panics
    /// When they don't come to rest.
    pub fn run(&self) {
        for _ in 0..MAX_TURNS {
            if self.reactor.turn(Duration::ZERO).expect("a reactor") == 0 {
                return;
            }
        }
        panic!("the devices don't become idle");
    }

    /// Resets a device and brings it up with all it offers, as a good driver does.
    ///
    /// # Panics
    /// When it doesn't come up.
    pub fn bring_up(&mut self, device: usize) {
        let window = &mut self.windows[device];
        window.negotiate(u64::MAX);
        for index in 0..window.queues.len() {
            window.configure(index, window.queues[index].size().into(), None);
        }
        window.write(STATUS, ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK);
        let status = window.read(STATUS);
        assert_eq!(status, 0xf, "status of a device that was brought up");
        self.run();
    }

    /// Submits a chain to a queue of a device, notifies it and lets the devices work.
    pub fn submit(&mut self, device: usize, queue: u16, buffers: &[Buffer]) {
        let window = &mut self.windows[device];
        let driver = &mut window.queues[usize::from(queue)];
        driver.submit(buffers);
        if driver.kick() {
            window.write(QUEUE_NOTIFY, queue.into());
        }
        self.run();
    }

    /// The next chain that a device has returned.
    pub fn used(&mut self, device: usize, queue: u16) -> Option<Used> {
        self.windows[device].queues[usize::from(queue)].used()
    }

    /// Interrupts that a device has raised.
    pub fn interrupts(&self, device: usize) -> u64 {
        self.windows[device].interrupts.load(Ordering::SeqCst)
    }

    /// Whether a device has given up until it is reset.
    pub fn is_broken(&self, device: usize) -> bool {
        self.windows[device].read(STATUS) & NEEDS_RESET != 0
    }

    /// Does to a device what `script` says: bad queues, bad requests, registers at the wrong time.
    ///
    /// # Panics
    /// When the device does, or doesn't come to rest.
    pub fn misuse(&mut self, device: usize, script: &[u8]) {
        let mut script = Script(script);
        while !script.0.is_empty() {
            let window = &mut self.windows[device];
            if window.misuse(&mut script) {
                self.run();
            }
        }
        self.run();
    }
}

impl Window {
    fn new(device: Box<dyn VirtioDevice>, reactor: &ManualReactor) -> Self {
        let guest = Guest::with_ranges(&[(1 << 20, 4 << 20), (64 << 20, 1 << 20)]);
        let queues = (0..)
            .zip(device.queue_max_sizes())
            .map(|(index, size)| DriverQueue::new(&guest, index, size.min(MAX_SIZE)))
            .collect();
        let interrupts = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&interrupts);
        let parts = MmioParts {
            memory: guest.memory().clone(),
            reactor: reactor.handle(),
            raise: Box::new(move || {
                counter.fetch_add(1, Ordering::SeqCst);
            }),
            lower: Box::new(|| false),
            observer: Arc::new(|_, _| ()),
        };
        Self {
            transport: MmioTransport::new(device, parts).expect("doorbells"),
            queues,
            interrupts,
            data: guest.alloc(64 << 10, 4096),
            guest,
        }
    }

    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, register: u64, value: u32) {
        // A transport never ends the VM.
        assert!(
            self.transport
                .write(register, &value.to_le_bytes())
                .is_continue()
        );
    }

    /// From reset to FEATURES_OK, with what is offered of `features`.
    fn negotiate(&mut self, features: u64) {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE_DRIVER);
        let mut accepted = 0;
        for page in 0..2 {
            self.write(DEVICE_FEATURES_SELECT, page);
            let offered = u64::from(self.read(DEVICE_FEATURES)) << (32 * page);
            let wanted = offered & (features | F_VERSION_1);
            self.write(DRIVER_FEATURES_SELECT, page);
            self.write(DRIVER_FEATURES, (wanted >> (32 * page)) as u32);
            accepted |= wanted;
        }
        self.write(STATUS, ACKNOWLEDGE_DRIVER | FEATURES_OK);
        for queue in &mut self.queues {
            queue.reset(accepted, 0);
        }
    }

    /// Tells where a queue is, or somewhere else.
    fn configure(&self, index: usize, size: u32, elsewhere: Option<[u64; 3]>) {
        self.write(QUEUE_SELECT, index as u32);
        self.write(QUEUE_SIZE, size);
        let addresses = elsewhere.unwrap_or_else(|| self.queues[index].addresses());
        for (register, address) in QUEUE_ADDRESSES.into_iter().zip(addresses) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// One deed; answers whether the devices get to work before the next.
    fn misuse(&mut self, script: &mut Script<'_>) -> bool {
        let guest = &self.guest;
        let index = usize::from(script.byte()) % self.queues.len();
        match script.byte() % 32 {
            deed @ 0..=13 => spoil(guest, &mut self.queues, script, (deed, index), self.data),
            // Configuration space, at any place and width.
            14 | 15 => {
                let bytes = script.long().to_le_bytes();
                let at = CONFIG + u64::from(script.byte());
                let width = 1 + usize::from(script.byte() % 8);
                let _ = self.transport.write(at, &bytes[..width]);
            }
            16 => {
                let at = CONFIG + u64::from(script.byte()) * u64::from(script.byte() % 9);
                let mut bytes = [0; 8];
                self.transport
                    .read(at, &mut bytes[..1 + usize::from(script.byte() % 8)]);
            }
            // Any register, also such as are not there or not written like that.
            17 | 18 => {
                let bytes = script.long().to_le_bytes();
                let at = u64::from(script.byte());
                let width = [4, 4, 4, 4, 1, 2, 8, 3][usize::from(script.byte() % 8)];
                let _ = self.transport.write(at, &bytes[..width]);
            }
            19 => {
                let mut bytes = [0; 8];
                let width = [1, 2, 4, 8][usize::from(script.byte() % 4)];
                self.transport
                    .read(script.byte().into(), &mut bytes[..width]);
            }
            // Notifications, of queues that are there and of others.
            20..=22 => self.write(QUEUE_NOTIFY, index as u32),
            23 => self.write(QUEUE_NOTIFY, script.long() as u32),
            // A reset, perhaps with requests under way.
            24 => self.write(STATUS, 0),
            25 => self.write(STATUS, u32::from(script.byte())),
            // Features after FEATURES_OK.
            26 => {
                self.write(DRIVER_FEATURES_SELECT, u32::from(script.byte() % 3));
                self.write(DRIVER_FEATURES, script.long() as u32);
            }
            // A queue that is live: another size, other places, off.
            27 => {
                let places = [(); 3].map(|()| script.address(guest, &self.queues, self.data));
                self.configure(index, u32::from(script.byte()), Some(places));
            }
            28 => {
                self.write(QUEUE_SELECT, index as u32);
                self.write(QUEUE_READY, u32::from(script.byte() % 2));
            }
            // Another start, with some of the features and queues that may be anywhere.
            29 | 30 => {
                let features = if script.byte().is_multiple_of(4) {
                    script.long()
                } else {
                    u64::MAX
                };
                self.negotiate(features);
                for index in 0..self.queues.len() {
                    self.place(script, index);
                }
                self.write(STATUS, ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK);
            }
            _ => return true,
        }
        false
    }

    /// Configures a queue, mostly as it should be.
    fn place(&self, script: &mut Script<'_>, index: usize) {
        let [descriptors, driver, device] = self.queues[index].addresses();
        let size = u32::from(self.queues[index].size());
        match script.byte() % 16 {
            0 => {}
            1 => self.configure(index, 0, None),
            2 => self.configure(index, u32::from(script.byte()), None),
            3 => self.configure(index, script.long() as u32, None),
            // Rings on top of each other, of another queue, of anything.
            4 => self.configure(index, size, Some([descriptors, driver, descriptors])),
            5 => self.configure(index, size, Some([driver & !15, driver, device])),
            6 => {
                let other = usize::from(script.byte()) % self.queues.len();
                self.configure(index, size, Some(self.queues[other].addresses()));
            }
            7 => {
                let places = [(); 3].map(|()| script.address(&self.guest, &self.queues, self.data));
                self.configure(index, size, Some(places));
            }
            _ => self.configure(index, size, None),
        }
    }
}
