//! The seam below which hypervisors differ.
//!
//! One backend is chosen by target ([`Host`]); everything above is generic over these traits and
//! runs over `fake` in tests. A vCPU is made as a [`VcpuSeed`] on the building thread and bound on
//! the thread that runs it, because some hypervisors tie it to that thread for good.

mod ahead;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
#[cfg(any(
    all(target_os = "macos", target_arch = "aarch64"),
    all(target_os = "linux", target_arch = "aarch64", feature = "hvf"),
    test
))]
pub mod hvf;
#[cfg(target_os = "linux")]
pub mod kvm;

use std::io;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::memory::StageTwo;
use crate::sys::doorbell::Doorbell;

pub(crate) use ahead::Ahead;

/// The signal that brings a vCPU's thread out of the guest: one that no C library keeps for itself.
pub(crate) const KICK: i32 = 40;

/// What the thread of a vCPU calls while the guest runs and to save it, and what whoever saves the
/// rest of a VM does.
#[cfg(target_os = "linux")]
pub(crate) use kvm::{RUN_VCPU, SAVE_VCPU, SAVE_VM};

/// What the thread of a vCPU calls while the guest runs.
#[cfg(not(target_os = "linux"))]
pub(crate) const RUN_VCPU: &[crate::jail::Rule] = &[];
/// What the thread of a vCPU calls to save it.
#[cfg(not(target_os = "linux"))]
pub(crate) const SAVE_VCPU: &[crate::jail::Rule] = &[];
/// What is called to save the rest of a VM.
#[cfg(not(target_os = "linux"))]
pub(crate) const SAVE_VM: &[crate::jail::Rule] = &[];

/// The hypervisor of the target this crate is built for.
#[cfg(all(
    target_os = "linux",
    not(all(target_arch = "aarch64", feature = "hvf"))
))]
pub type Host = kvm::Kvm;
/// The hypervisor of the target this crate is built for, or of its tests.
#[cfg(all(
    target_arch = "aarch64",
    any(target_os = "macos", all(target_os = "linux", feature = "hvf"))
))]
pub type Host = hvf::Hvf;

/// An open hypervisor.
pub trait Hypervisor: Sized {
    /// The VMs it makes.
    type Vm: VmBackend;
    /// What vCPUs can be told they are.
    type Cpu: Default;

    /// Opens the host's hypervisor and checks that it can do all that is asked of it here.
    ///
    /// # Errors
    /// Says whether it is absent, forbidden or lacking.
    fn open() -> Result<Self, HypervisorError>;

    /// What it offers.
    fn caps(&self) -> &Caps<Self::Cpu>;

    /// Makes an empty VM with its interrupt controllers.
    ///
    /// # Errors
    /// The call the host refused.
    fn create_vm(&self) -> Result<Self::Vm, HypervisorError>;
}

/// What a hypervisor offers, read once.
#[derive(Clone, Debug, Default)]
pub struct Caps<C> {
    /// vCPUs in one VM at most.
    pub max_vcpus: u32,
    /// What vCPUs can be told they are.
    pub cpu: C,
}

/// A VM of the hypervisor: address space, interrupt lines, vCPUs.
pub trait VmBackend: Send + Sync + 'static {
    /// See [`VcpuSeed`].
    type Seed: VcpuSeed;
    /// See [`IrqLine`].
    type Line: IrqLine;
    /// What it holds beside memory and vCPUs: interrupt controllers and clocks.
    type State: State;

    /// Shows `len` bytes of host memory to the guest from `guest` on, as slot `slot`.
    ///
    /// # Errors
    /// The call the host refused.
    ///
    /// # Safety
    /// The memory stays mapped until the VM and all its vCPUs are gone or the slot is unmapped, and
    /// nothing in this process takes references into it.
    #[allow(unsafe_code)]
    unsafe fn map(
        &self,
        slot: u32,
        guest: u64,
        host: *mut u8,
        len: u64,
    ) -> Result<(), HypervisorError>;

    /// Takes slot `slot` away from the guest.
    ///
    /// # Errors
    /// The call the host refused.
    fn unmap(&self, slot: u32) -> Result<(), HypervisorError>;

    /// What guest RAM has to go through to be given back to the host, if the VM holds on to it.
    fn stage_two(&self) -> Option<Box<dyn StageTwo>> {
        None
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// The call the host refused.
    fn create_vcpu(&self, index: u32) -> Result<Self::Seed, HypervisorError>;

    /// All vCPUs have been made: finishes what depends on how many there are. Lines and doorbells
    /// come after it.
    ///
    /// # Errors
    /// The call the host refused.
    fn complete(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// Each vCPU is bound to its thread and none has been given its state: finishes what depends on
    /// that, such as a [`restore`](Self::restore).
    ///
    /// # Errors
    /// The call the host refused.
    fn bound(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// The interrupt line of a pin of the VM's interrupt controller. A pin may have several lines.
    ///
    /// # Errors
    /// The call the host refused.
    fn irq_line(&self, pin: u32) -> Result<Self::Line, HypervisorError>;

    /// Reads what the VM holds beside memory and vCPUs. The vCPUs stand still.
    ///
    /// # Errors
    /// The call the host refused.
    fn save(&self) -> Result<Self::State, HypervisorError>;

    /// Writes it into a fresh VM whose vCPUs have all been made and none has run.
    ///
    /// # Errors
    /// The call the host refused, which it does with a state that it can't hold.
    fn restore(&self, state: &Self::State) -> Result<(), HypervisorError>;

    /// Asks that a 32-bit write of `value` at guest address `address` rings `doorbell` without an
    /// exit.
    ///
    /// # Errors
    /// The call the host refused.
    fn bind_doorbell(
        &self,
        address: u64,
        value: u32,
        doorbell: &Doorbell,
    ) -> Result<Binding, HypervisorError>;
}

/// A hypervisor's own record of something, which goes into a snapshot as it is. One that comes out
/// of a file can hold anything: the hypervisor is what checks it.
pub trait State: Serialize + DeserializeOwned + Send + 'static {}

impl<S: Serialize + DeserializeOwned + Send + 'static> State for S {}

/// How a guest's write reaches a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// The hypervisor rings it.
    Bound,
    /// The write exits, and the device on the bus rings it.
    Exits,
}

/// A vCPU that has not been bound to its thread.
pub trait VcpuSeed: Send + 'static {
    /// What it becomes.
    type Vcpu: Vcpu;
    /// See [`Kicker`].
    type Kicker: Kicker;

    /// Forces this vCPU out of the guest, from any thread, also before it is bound.
    fn kicker(&self) -> Self::Kicker;

    /// Binds the vCPU to the calling thread.
    ///
    /// # Errors
    /// The call the host refused.
    fn bind(self) -> Result<Self::Vcpu, HypervisorError>;
}

/// A vCPU on its own thread.
pub trait Vcpu {
    /// The state it starts in: its architecture's.
    type Setup: Clone + Send + 'static;
    /// Everything it holds.
    type State: State;

    /// Puts it into the state its first instruction expects.
    ///
    /// # Errors
    /// The call the host refused.
    fn boot(&mut self, setup: &Self::Setup) -> Result<(), HypervisorError>;

    /// Reads everything it holds. The answer to its last exit is given to the guest first.
    ///
    /// # Errors
    /// The call the host refused.
    fn save(&mut self) -> Result<Self::State, HypervisorError>;

    /// Makes a vCPU that has not run what another one was; instead of [`boot`](Self::boot).
    ///
    /// # Errors
    /// The call the host refused, which it does with a state that its processor can't have.
    fn restore(&mut self, state: &Self::State) -> Result<(), HypervisorError>;

    /// Runs the guest until something needs attention. What the answer of a read is left with is
    /// given to the guest at the next call.
    fn run(&mut self) -> VcpuExit<'_>;

    /// It goes on after it was kept out of the guest for a while. The guest is told, where it can be:
    /// its watchdogs then don't take the time for a hang of its own.
    fn resumed(&mut self);
}

/// Forces a vCPU out of the guest. A kick before the vCPU runs makes its next run return at once;
/// backends may lose one all the same, so kicks are repeated until the vCPU has answered.
pub trait Kicker: Clone + Send + Sync + 'static {
    /// Kicks.
    fn kick(&self);
}

/// A wire into the interrupt controller.
pub trait IrqLine: Send + Sync + 'static {
    /// Sets its level.
    fn set(&self, high: bool);
    /// Raises an edge.
    fn pulse(&self);
    /// A virtio device has news: an edge, or where the guest is told of levels, a high one.
    fn raise(&self) {
        self.pulse();
    }
    /// The driver has acknowledged. Where lines are levels, this one goes low, and the answer is
    /// that whoever has more news must raise it again; an edge needs nothing.
    fn lower(&self) -> bool {
        false
    }
}

/// Why a vCPU came out of the guest.
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// The guest reads device memory; `data` takes the answer.
    MmioRead {
        /// Guest address.
        address: u64,
        /// 1, 2, 4 or 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes device memory.
    MmioWrite {
        /// Guest address.
        address: u64,
        /// 1, 2, 4 or 8 bytes.
        data: &'a [u8],
    },
    /// The guest reads an x86 port: `data` takes one answer for each `size` bytes.
    PioRead {
        /// Port number.
        port: u16,
        /// Width of one access: 1, 2 or 4.
        size: usize,
        /// A multiple of `size` bytes.
        data: &'a mut [u8],
    },
    /// The guest writes an x86 port, once for each `size` bytes of `data`.
    PioWrite {
        /// Port number.
        port: u16,
        /// Width of one access: 1, 2 or 4.
        size: usize,
        /// A multiple of `size` bytes.
        data: &'a [u8],
    },
    /// The guest asked firmware to switch off.
    SystemOff,
    /// The guest asked firmware for a reset.
    SystemReset,
    /// The processor shut down: a triple fault on x86.
    Shutdown,
    /// A [`Kicker`] did it, or nothing at all.
    Kicked,
    /// The vCPU cannot go on.
    Fault(Fault),
}

/// What a vCPU cannot go on from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The processor refused the guest's state.
    #[error("Processor refused to enter the guest (reason {reason:#x})")]
    EntryFailed {
        /// The hardware's own code.
        reason: u64,
    },
    /// The hypervisor could not carry out an instruction of the guest.
    #[error("Hypervisor could not emulate the guest (suberror {suberror}, details {details:x?})")]
    Emulation {
        /// The hypervisor's code.
        suberror: u32,
        /// What it tells beyond that, such as the bytes of the instruction.
        details: Vec<u64>,
    },
    /// The guest touched memory the host cannot give.
    #[error("Guest memory at {address:#x}+{size:#x} is not accessible")]
    Memory {
        /// Guest address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// An exit nobody here knows.
    #[error("Unexpected exit {what}")]
    Unexpected {
        /// The exit's name or number.
        what: String,
    },
    /// The call that enters the guest failed.
    #[error("Entering the guest failed: {error}")]
    Run {
        /// What the system call answered.
        error: String,
    },
}

/// Why the hypervisor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// There is no hypervisor.
    #[error("{path} does not exist: this machine offers no KVM")]
    Absent {
        /// The device looked for.
        path: PathBuf,
    },
    /// This user may not use it.
    #[error("{path} may not be opened: add this user to the group that owns it")]
    Forbidden {
        /// The device.
        path: PathBuf,
        /// What `open` answered.
        source: io::Error,
    },
    /// It cannot be opened for another reason.
    #[error("Cannot open {path}")]
    Open {
        /// The device.
        path: PathBuf,
        /// What `open` answered.
        source: io::Error,
    },
    /// It speaks another language.
    #[error("{path} speaks KVM API {found}, expected 12")]
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// What it answered; -1 for a file that is not KVM.
        found: i32,
    },
    /// It cannot do something that is needed.
    #[error("KVM of this host lacks {capability}")]
    Lacks {
        /// The capability's name in the KVM API.
        capability: &'static str,
    },
    /// macOS lets nobody use it who is not signed for it.
    #[error(
        "macOS refuses this program a VM: it must be signed with the entitlement \
         com.apple.security.hypervisor (`make install` does)"
    )]
    NotEntitled,
    /// A process of macOS has one VM at most.
    #[error("This process has a VM already, and macOS gives a process no second one")]
    OneVm,
    /// It differs from what a guest would be told, or a snapshot from what it has.
    #[error("Unsuitable {what}: {found:#x}, expected {expected:#x}")]
    Unsuitable {
        /// What differs.
        what: &'static str,
        /// How it is.
        found: u64,
        /// How it should be, or the most it may be.
        expected: u64,
    },
    /// A register of a snapshot that this host's processor can't hold.
    #[error("MSR {index:#x} can't be set to {value:#x} on this host")]
    Msr {
        /// The register's number.
        index: u32,
        /// The snapshot's value.
        value: u64,
    },
    /// A processor of a snapshot that this host's is not.
    #[error("Snapshot's processor {found}, and this host's {here}")]
    Processor {
        /// What it is, or has.
        found: String,
        /// What the host's is, or lacks.
        here: String,
    },
    /// It refused a call.
    #[error("{call} failed")]
    Call {
        /// The call's name in the hypervisor's API.
        call: &'static str,
        /// What it answered.
        source: io::Error,
    },
}
