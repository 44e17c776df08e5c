//! The one VM there can be, and what a test sees of it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use applevisor_sys::hv_vcpu_exit_t;

/// How a vCPU comes out of its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// By an exception with this syndrome, at this guest-physical address.
    Exception {
        /// `ESR_EL2`.
        syndrome: u64,
        /// Where a load or store went.
        address: u64,
    },
    /// The guest changes a register, and stays inside.
    Set {
        /// The framework's number: X0 to X30, then PC, FPCR, FPSR, CPSR.
        register: u32,
        /// Its new value.
        value: u64,
    },
    /// Because its virtual timer is due.
    Timer,
    /// By force, although nobody asked for it.
    Cancelled,
    /// For no reason it knows.
    Unknown,
    /// Not at all: `hv_vcpu_run` fails with this code.
    Fails(i32),
}

/// What was done to a piece of memory, by guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryCall {
    /// It went into the guest.
    Map(u64),
    /// It went out.
    Unmap(u64),
}

pub(crate) const VCPUS: u32 = 8;
/// Registers that are not system registers.
pub(crate) const REGISTERS: usize = 35;

#[derive(Default)]
pub(crate) struct Vcpu {
    pub(crate) thread: Option<ThreadId>,
    /// What `hv_vcpu_create` handed out a pointer to.
    pub(crate) exit: Option<Box<hv_vcpu_exit_t>>,
    pub(crate) registers: Vec<u64>,
    pub(crate) vectors: Vec<u128>,
    pub(crate) system: HashMap<u16, u64>,
    pub(crate) interface: HashMap<u16, u64>,
    pub(crate) timer_masked: bool,
    pub(crate) timer_offset: u64,
    pub(crate) cancelled: bool,
    pub(crate) running: bool,
    /// The registers at each entry.
    pub(crate) entries: Vec<Vec<u64>>,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) vm: bool,
    pub(crate) ipa_bits: u32,
    pub(crate) gic: Option<(u64, u64)>,
    pub(crate) gic_state: Vec<u8>,
    /// Guest address to length and host address.
    pub(crate) mapped: BTreeMap<u64, (usize, usize)>,
    pub(crate) memory_calls: Vec<MemoryCall>,
    pub(crate) full: bool,
    pub(crate) interrupts: Vec<(u32, bool)>,
    pub(crate) vcpus: BTreeMap<u64, Vcpu>,
    /// By `MPIDR_EL1` without its fixed bit.
    pub(crate) scripts: HashMap<u64, VecDeque<Step>>,
    pub(crate) entries: HashMap<u64, Vec<Vec<u64>>>,
    pub(crate) next: u64,
    pub(crate) denied: bool,
    /// What is created and not released yet.
    pub(crate) objects: usize,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);
pub(crate) static CHANGED: Condvar = Condvar::new();
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The world, and what is wrong with the call if there is none.
pub(crate) struct Locked(MutexGuard<'static, Option<World>>);

impl Locked {
    pub(crate) fn wait(self) -> Self {
        Self(CHANGED.wait(self.0).unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::ops::Deref for Locked {
    type Target = World;
    fn deref(&self) -> &World {
        self.0
            .as_ref()
            .expect("a test of the framework holds a Session")
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut World {
        self.0
            .as_mut()
            .expect("a test of the framework holds a Session")
    }
}

pub(crate) fn world() -> Locked {
    Locked(WORLD.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A test's hold on the framework: a process has one VM, so tests take turns.
#[derive(Debug)]
pub struct Session {
    _turn: MutexGuard<'static, ()>,
}

impl Session {
    /// Waits for its turn, and begins with nothing.
    pub fn begin() -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        *WORLD.lock().unwrap_or_else(PoisonError::into_inner) = Some(World::default());
        Self { _turn: turn }
    }

    /// What the vCPU of this affinity does when it runs. At its end it stays in the guest until it
    /// is forced out.
    pub fn script(&self, affinity: u64, steps: impl IntoIterator<Item = Step>) {
        world().scripts.entry(affinity).or_default().extend(steps);
        CHANGED.notify_all();
    }

    /// Lets `hv_vm_create` fail as for a program that is not signed for it.
    pub fn deny(&self) {
        world().denied = true;
    }

    /// Whether there is a VM.
    pub fn has_vm(&self) -> bool {
        world().vm
    }

    /// Where distributor and redistributors are.
    pub fn gic(&self) -> Option<(u64, u64)> {
        world().gic
    }

    /// Pieces of memory in the guest, by address and length.
    pub fn mapped(&self) -> Vec<(u64, usize)> {
        let world = world();
        world
            .mapped
            .iter()
            .map(|(at, (len, _))| (*at, *len))
            .collect()
    }

    /// What was done to memory since the last time this was asked.
    pub fn memory_calls(&self) -> Vec<MemoryCall> {
        std::mem::take(&mut world().memory_calls)
    }

    /// Has `hv_vm_map` fail for want of memory from now on.
    pub fn fill(&self) {
        world().full = true;
    }

    /// What was done to interrupts, by number and level.
    pub fn interrupts(&self) -> Vec<(u32, bool)> {
        world().interrupts.clone()
    }

    /// The registers of a vCPU each time it entered its guest: X0 to X30, PC, FPCR, FPSR, CPSR.
    pub fn entries(&self, affinity: u64) -> Vec<Vec<u64>> {
        let world = world();
        let mut all = world.entries.get(&affinity).cloned().unwrap_or_default();
        let of = |vcpu: &&Vcpu| vcpu.affinity() == affinity;
        all.extend(
            world
                .vcpus
                .values()
                .filter(of)
                .flat_map(|vcpu| vcpu.entries.clone()),
        );
        all
    }

    /// Waits until a vCPU is in its guest with nothing left to do.
    pub fn wait_until_inside(&self, affinity: u64) {
        let mut world = world();
        while !world
            .vcpus
            .values()
            .any(|vcpu| vcpu.affinity() == affinity && vcpu.running)
        {
            world = world.wait();
        }
    }

    /// A system register of a vCPU that exists, by the framework's number.
    pub fn system_register(&self, affinity: u64, register: u16) -> Option<u64> {
        let world = world();
        let vcpu = world
            .vcpus
            .values()
            .find(|vcpu| vcpu.affinity() == affinity)?;
        vcpu.system.get(&register).copied()
    }

    /// The timer offsets of all vCPUs that exist.
    pub fn timer_offsets(&self) -> Vec<u64> {
        world()
            .vcpus
            .values()
            .map(|vcpu| vcpu.timer_offset)
            .collect()
    }

    /// vCPUs and objects that exist.
    pub fn left(&self) -> (usize, usize) {
        let world = world();
        (world.vcpus.len(), world.objects)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        *WORLD.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Vcpu {
    pub(crate) fn affinity(&self) -> u64 {
        let mpidr = applevisor_sys::hv_sys_reg_t::MPIDR_EL1 as u16;
        self.system
            .get(&mpidr)
            .map_or(u64::MAX, |value| value & 0xff_ffff)
    }
}
