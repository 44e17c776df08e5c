//! A hypervisor without a processor: its vCPUs play a script. For tests of what lies above the seam.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddress;

use super::{
    Binding, Caps, Fault, Hypervisor, HypervisorError, IrqLine, Kicker, Vcpu, VcpuExit, VcpuSeed,
    VmBackend,
};
use crate::arch::{CpuCaps, VcpuSetup};
use crate::memory::StageTwo;
use crate::sys::doorbell::Doorbell;

/// One exit of a scripted vCPU.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "fields as in `VcpuExit`")]
pub enum Step {
    MmioRead {
        address: u64,
        len: usize,
    },
    MmioWrite {
        address: u64,
        data: Vec<u8>,
    },
    PioRead {
        port: u16,
        size: usize,
        count: usize,
    },
    PioWrite {
        port: u16,
        size: usize,
        data: Vec<u8>,
    },
    SystemOff,
    SystemReset,
    Shutdown,
    Kicked,
    /// Stays in the guest until it is kicked.
    UntilKicked,
    /// Comes out for kicks and goes on, without end.
    Forever,
    /// Stays in the guest, deaf to kicks, until the test is there too.
    Meet(Arc<Barrier>),
    Fault(Fault),
}

/// What a read of the script was answered.
pub type Answer = Vec<u8>;

/// A hypervisor whose vCPUs play the scripts it is given.
#[derive(Clone, Debug, Default)]
pub struct Fake {
    caps: Caps<CpuCaps>,
    scripts: Vec<Vec<Step>>,
    record: Arc<Mutex<Record>>,
    unit: Option<u64>,
    rings: bool,
}

/// What was done to the VM.
#[derive(Debug, Default)]
pub struct Record {
    /// Slot to guest address and length.
    pub mapped: BTreeMap<u32, (u64, u64)>,
    /// Guest address and length of what was unmapped and mapped again, to be given back.
    pub renewed: Vec<(u64, u64)>,
    /// Edges by pin.
    pub edges: BTreeMap<u32, u32>,
    /// Doorbells by address and value.
    pub doorbells: Vec<(u64, u32)>,
    /// The setup of each vCPU that was booted.
    pub booted: Vec<VcpuSetup>,
    /// How often a vCPU went on after a pause.
    pub resumed: usize,
}

impl Fake {
    /// A hypervisor with a script for each vCPU.
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        let caps = Caps {
            max_vcpus: 8,
            ..Default::default()
        };
        Self {
            caps,
            scripts,
            record: Arc::default(),
            unit: None,
            rings: false,
        }
    }

    /// The same, whose VMs ring doorbells without an exit.
    pub fn ringing(self) -> Self {
        Self {
            rings: true,
            ..self
        }
    }

    /// The same, whose VMs hold on to memory, in units of so many bytes.
    pub fn holding(self, unit: u64) -> Self {
        Self {
            unit: Some(unit),
            ..self
        }
    }

    /// What was done so far.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hypervisor for Fake {
    type Vm = FakeVm;
    type Cpu = CpuCaps;

    fn open() -> Result<Self, HypervisorError> {
        Ok(Self::new(Vec::new()))
    }

    fn caps(&self) -> &Caps<CpuCaps> {
        &self.caps
    }

    fn create_vm(&self) -> Result<FakeVm, HypervisorError> {
        Ok(FakeVm {
            scripts: self.scripts.clone(),
            record: Arc::clone(&self.record),
            unit: self.unit,
            rings: self.rings,
        })
    }
}

/// A VM of the fake.
#[derive(Debug)]
pub struct FakeVm {
    scripts: Vec<Vec<Step>>,
    record: Arc<Mutex<Record>>,
    unit: Option<u64>,
    rings: bool,
}

/// Notes what goes through it.
#[derive(Debug)]
struct Held {
    unit: u64,
    record: Arc<Mutex<Record>>,
}

impl StageTwo for Held {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn unmap(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        lock(&self.record).renewed.push((start.0, len));
        Ok(())
    }

    fn map(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        match lock(&self.record).renewed.last() {
            Some(last) if *last == (start.0, len) => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl VmBackend for FakeVm {
    type Seed = FakeSeed;
    type Line = FakeLine;
    /// Edges by pin.
    type State = BTreeMap<u32, u32>;

    #[allow(unsafe_code)]
    unsafe fn map(
        &self,
        slot: u32,
        guest: u64,
        _: *mut u8,
        len: u64,
    ) -> Result<(), HypervisorError> {
        lock(&self.record).mapped.insert(slot, (guest, len));
        Ok(())
    }

    fn unmap(&self, slot: u32) -> Result<(), HypervisorError> {
        lock(&self.record).mapped.remove(&slot);
        Ok(())
    }

    fn stage_two(&self) -> Option<Box<dyn StageTwo>> {
        let record = Arc::clone(&self.record);
        let held = |unit| -> Box<dyn StageTwo> { Box::new(Held { unit, record }) };
        self.unit.map(held)
    }

    fn create_vcpu(&self, index: u32) -> Result<FakeSeed, HypervisorError> {
        let script = self
            .scripts
            .get(index as usize)
            .cloned()
            .unwrap_or_default();
        let mut vcpu = FakeVcpu::scripted(script);
        vcpu.record = Arc::clone(&self.record);
        Ok(FakeSeed(vcpu))
    }

    fn irq_line(&self, pin: u32) -> Result<FakeLine, HypervisorError> {
        Ok(FakeLine {
            pin,
            record: Arc::clone(&self.record),
        })
    }

    fn save(&self) -> Result<BTreeMap<u32, u32>, HypervisorError> {
        Ok(lock(&self.record).edges.clone())
    }

    fn restore(&self, state: &BTreeMap<u32, u32>) -> Result<(), HypervisorError> {
        lock(&self.record).edges.clone_from(state);
        Ok(())
    }

    fn bind_doorbell(
        &self,
        address: u64,
        value: u32,
        _: &Doorbell,
    ) -> Result<Binding, HypervisorError> {
        lock(&self.record).doorbells.push((address, value));
        Ok(if self.rings {
            Binding::Bound
        } else {
            Binding::Exits
        })
    }
}

/// A line of the fake: counts edges.
#[derive(Debug)]
pub struct FakeLine {
    pin: u32,
    record: Arc<Mutex<Record>>,
}

impl IrqLine for FakeLine {
    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }

    fn pulse(&self) {
        *lock(&self.record).edges.entry(self.pin).or_default() += 1;
    }
}

/// A vCPU of the fake, unbound.
#[derive(Debug)]
pub struct FakeSeed(FakeVcpu);

impl VcpuSeed for FakeSeed {
    type Vcpu = FakeVcpu;
    type Kicker = FakeKicker;

    fn kicker(&self) -> FakeKicker {
        self.0.kicker.clone()
    }

    fn bind(self) -> Result<FakeVcpu, HypervisorError> {
        Ok(self.0)
    }
}

/// A vCPU that plays a script, then faults.
#[derive(Debug)]
pub struct FakeVcpu {
    script: VecDeque<Step>,
    played: usize,
    current: Vec<u8>,
    awaits_answer: bool,
    answers: Vec<Answer>,
    kicker: FakeKicker,
    record: Arc<Mutex<Record>>,
}

impl FakeVcpu {
    /// A vCPU with this script.
    pub fn scripted(script: Vec<Step>) -> Self {
        Self {
            script: script.into(),
            played: 0,
            current: Vec::new(),
            awaits_answer: false,
            answers: Vec::new(),
            kicker: FakeKicker::default(),
            record: Arc::default(),
        }
    }

    /// What reads were answered, as far as the script went on after them.
    pub fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Steps not played.
    pub fn steps_left(&self) -> usize {
        self.script.len()
    }
}

impl Vcpu for FakeVcpu {
    type Setup = VcpuSetup;
    /// How many steps it has played.
    type State = usize;

    fn save(&mut self) -> Result<usize, HypervisorError> {
        Ok(self.played)
    }

    fn restore(&mut self, &played: &usize) -> Result<(), HypervisorError> {
        self.script.drain(..played.min(self.script.len()));
        self.played = played;
        Ok(())
    }

    fn boot(&mut self, setup: &VcpuSetup) -> Result<(), HypervisorError> {
        lock(&self.record).booted.push(setup.clone());
        Ok(())
    }

    fn resumed(&mut self) {
        lock(&self.record).resumed += 1;
    }

    fn run(&mut self) -> VcpuExit<'_> {
        if std::mem::take(&mut self.awaits_answer) {
            self.answers.push(self.current.clone());
        }
        let Some(step) = self.script.pop_front() else {
            return VcpuExit::Fault(Fault::Unexpected {
                what: "end of script".into(),
            });
        };
        self.played += 1;
        match step {
            Step::MmioRead { address, len } => {
                self.awaits_answer = true;
                self.current = vec![0; len];
                VcpuExit::MmioRead {
                    address,
                    data: &mut self.current,
                }
            }
            Step::MmioWrite { address, data } => {
                self.current = data;
                VcpuExit::MmioWrite {
                    address,
                    data: &self.current,
                }
            }
            Step::PioRead { port, size, count } => {
                self.awaits_answer = true;
                self.current = vec![0; size * count];
                VcpuExit::PioRead {
                    port,
                    size,
                    data: &mut self.current,
                }
            }
            Step::PioWrite { port, size, data } => {
                self.current = data;
                VcpuExit::PioWrite {
                    port,
                    size,
                    data: &self.current,
                }
            }
            Step::SystemOff => VcpuExit::SystemOff,
            Step::SystemReset => VcpuExit::SystemReset,
            Step::Shutdown => VcpuExit::Shutdown,
            Step::Kicked => VcpuExit::Kicked,
            Step::UntilKicked => {
                self.kicker.wait();
                VcpuExit::Kicked
            }
            Step::Meet(barrier) => {
                barrier.wait();
                VcpuExit::Kicked
            }
            Step::Forever => {
                self.script.push_front(Step::Forever);
                self.kicker.wait();
                VcpuExit::Kicked
            }
            Step::Fault(fault) => VcpuExit::Fault(fault),
        }
    }
}

/// Wakes a vCPU of the fake.
#[derive(Clone, Debug, Default)]
pub struct FakeKicker {
    kicked: Arc<(Mutex<bool>, Condvar)>,
}

impl FakeKicker {
    fn wait(&self) {
        let (kicked, changed) = &*self.kicked;
        let mut kicked = lock(kicked);
        while !std::mem::take(&mut *kicked) {
            kicked = changed.wait(kicked).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Kicker for FakeKicker {
    fn kick(&self) {
        let (kicked, changed) = &*self.kicked;
        *lock(kicked) = true;
        changed.notify_all();
    }
}
