//! vCPUs: made and used on one thread, left by force only to pause, stop or save.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use applevisor::error::HypervisorError as HvError;
use applevisor::vcpu::{ExitReason, Reg, SysReg, Vcpu as Raw, VcpuExit as RawExit, VcpuHandle};

use super::exit::{Access, INSTRUCTION, SystemRegister, Trap, is_untranslated};
use super::registers::{GENERAL, is_news};
use super::state::{self, VcpuState};
use super::{Machine, call};
use crate::arch::aarch64::psci::{Awake, Call, Outcome};
use crate::arch::aarch64::{Entry, VcpuSetup, layout};
use crate::hypervisor::{Fault, HypervisorError, Kicker, Vcpu, VcpuExit, VcpuSeed};

/// `PSTATE` at a kernel's first instruction: EL1 with its own stack pointer, all interrupts masked.
const FIRST_PSTATE: u64 = 0x3c5;
/// Bit 31 of `MPIDR_EL1` is always set.
const MPIDR_FIXED: u64 = 1 << 31;
/// `ID_AA64PFR1_EL1.SME`: what macOS 15.0 can't save.
const SME: u64 = 0xf << 24;
/// What an SMC finds: PSCI is reached by HVC.
const NOT_SUPPORTED: u64 = u64::MAX;

/// A vCPU that has not been bound: the framework makes it on its thread.
#[derive(Debug)]
pub struct HvfSeed {
    machine: Arc<Machine>,
    place: usize,
    affinity: u64,
    kicker: HvfKicker,
}

impl HvfSeed {
    pub(super) fn new(machine: Arc<Machine>, index: u32) -> Self {
        let affinity = layout::affinity(index);
        let place = machine.processors.add(affinity);
        let kicker = HvfKicker {
            target: Arc::new(Target {
                machine: Arc::clone(&machine),
                place,
                kicked: AtomicBool::new(false),
                handle: Mutex::new(None),
            }),
        };
        Self {
            machine,
            place,
            affinity,
            kicker,
        }
    }
}

impl VcpuSeed for HvfSeed {
    type Vcpu = HvfVcpu;
    type Kicker = HvfKicker;

    fn kicker(&self) -> HvfKicker {
        self.kicker.clone()
    }

    fn bind(self) -> Result<HvfVcpu, HypervisorError> {
        let raw = self
            .machine
            .with(applevisor::vm::VirtualMachineInstance::vcpu_create)
            .map_err(call("hv_vcpu_create"))?;
        let sys = |register, value| {
            raw.set_sys_reg(register, value)
                .map_err(call("hv_vcpu_set_sys_reg"))
        };
        // It says which redistributor is this vCPU's, so before anything else.
        sys(SysReg::MPIDR_EL1, MPIDR_FIXED | self.affinity)?;
        let features = raw
            .get_sys_reg(SysReg::ID_AA64PFR1_EL1)
            .map_err(call("hv_vcpu_get_sys_reg"))?;
        if features & SME != 0 {
            sys(SysReg::ID_AA64PFR1_EL1, features & !SME)?;
        }
        raw.set_vtimer_offset(self.machine.epoch())
            .map_err(call("hv_vcpu_set_vtimer_offset"))?;
        let first_sctlr = raw
            .get_sys_reg(SysReg::SCTLR_EL1)
            .map_err(call("hv_vcpu_get_sys_reg"))?;
        *self.kicker.target.handle() = Some(raw.get_handle());
        Ok(HvfVcpu {
            raw,
            machine: self.machine,
            place: self.place,
            target: self.kicker.target,
            first_sctlr,
            load: None,
            buffer: [0; 8],
        })
    }
}

/// Forces a vCPU out of the guest. One that is about to enter meets the flag or, between the two,
/// the next kick; one that is switched off is woken.
#[derive(Clone, Debug)]
pub struct HvfKicker {
    target: Arc<Target>,
}

#[derive(Debug)]
struct Target {
    machine: Arc<Machine>,
    place: usize,
    kicked: AtomicBool,
    /// Known once it is bound.
    handle: Mutex<Option<VcpuHandle>>,
}

impl Target {
    fn handle(&self) -> MutexGuard<'_, Option<VcpuHandle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kicker for HvfKicker {
    fn kick(&self) {
        let target = &*self.target;
        target.kicked.store(true, Ordering::SeqCst);
        target.machine.processors.kick(target.place);
        let handle = target.handle().clone();
        if let Some(handle) = handle
            && let Err(error) = target.machine.with(|vm| vm.vcpus_exit(&[handle]))
        {
            // It, or the VM, has gone.
            tracing::debug!(%error, "hv_vcpus_exit failed");
        }
    }
}

/// A vCPU on its thread.
#[derive(Debug)]
pub struct HvfVcpu {
    raw: Raw,
    machine: Arc<Machine>,
    place: usize,
    target: Arc<Target>,
    /// `SCTLR_EL1` as it was made: MMU off.
    first_sctlr: u64,
    /// A load that waits for its value, which is in `buffer`.
    load: Option<Access>,
    buffer: [u8; 8],
}

impl Drop for HvfVcpu {
    fn drop(&mut self) {
        *self.target.handle() = None;
    }
}

/// What a call of the framework answers.
type Answer<T> = Result<T, HvError>;

impl Vcpu for HvfVcpu {
    type Setup = VcpuSetup;
    type State = VcpuState;

    fn boot(&mut self, setup: &VcpuSetup) -> Result<(), HypervisorError> {
        let Some(entry) = setup.entry else {
            return Ok(());
        };
        self.begin(entry).map_err(call("hv_vcpu_set_reg"))?;
        self.machine.processors.set_on(self.place);
        Ok(())
    }

    fn save(&mut self) -> Result<VcpuState, HypervisorError> {
        self.complete().map_err(call("hv_vcpu_set_reg"))?;
        state::save_vcpu(&self.raw, self.machine.processors.is_on(self.place))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HypervisorError> {
        state::restore_vcpu(&self.raw, state, self.machine.epoch())?;
        if state.is_on() {
            self.machine.processors.set_on(self.place);
        }
        Ok(())
    }

    fn run(&mut self) -> VcpuExit<'_> {
        match self.run_until_exit() {
            Ok(exit) => self.present(exit),
            Err(error) => VcpuExit::Fault(Fault::Run {
                error: error.to_string(),
            }),
        }
    }

    /// The guest's clocks went on, and nothing in this framework tells it why.
    fn resumed(&mut self) {}
}

/// An exit, before what it borrows.
enum Exit {
    Read { address: u64, size: usize },
    Write { address: u64, size: usize },
    Kicked,
    SystemOff,
    SystemReset,
    Fault(Fault),
}

impl HvfVcpu {
    /// Puts it where a kernel or a `CPU_ON` has it start.
    fn begin(&self, entry: Entry) -> Answer<()> {
        self.raw.set_sys_reg(SysReg::SCTLR_EL1, self.first_sctlr)?;
        self.raw.set_reg(Reg::CPSR, FIRST_PSTATE)?;
        self.raw.set_reg(Reg::PC, entry.pc)?;
        self.raw.set_reg(Reg::X0, entry.x0)?;
        // Reserved for the future (booting.rst).
        for register in [Reg::X1, Reg::X2, Reg::X3] {
            self.raw.set_reg(register, 0)?;
        }
        Ok(())
    }

    /// Gives the guest the answer to its last load.
    fn complete(&mut self) -> Answer<()> {
        let Some(access) = self.load.take() else {
            return Ok(());
        };
        self.set_general(access.register, access.extend(self.buffer))?;
        self.skip()
    }

    fn run_until_exit(&mut self) -> Answer<Exit> {
        self.complete()?;
        loop {
            match self.machine.processors.wait(self.place) {
                Awake::On => {}
                Awake::Started(entry) => self.begin(entry)?,
                Awake::Kicked => {
                    self.target.kicked.store(false, Ordering::SeqCst);
                    return Ok(Exit::Kicked);
                }
            }
            if self.target.kicked.swap(false, Ordering::SeqCst) {
                return Ok(Exit::Kicked);
            }
            self.raw.run()?;
            let exit = self.raw.get_exit_info();
            if let Some(exit) = self.handle(&exit)? {
                return Ok(exit);
            }
        }
    }

    /// Answers what needs nobody else; everything else is an exit.
    fn handle(&mut self, exit: &RawExit) -> Answer<Option<Exit>> {
        match exit.reason {
            ExitReason::CANCELED => {
                self.target.kicked.store(false, Ordering::SeqCst);
                return Ok(Some(Exit::Kicked));
            }
            // Only without an interrupt controller in the kernel, and masked until we say so.
            ExitReason::VTIMER_ACTIVATED => {
                self.raw.set_vtimer_mask(false)?;
                return Ok(None);
            }
            ExitReason::EXCEPTION => {}
            ExitReason::UNKNOWN => {
                return Ok(Some(Exit::Fault(Fault::Unexpected {
                    what: "of unknown reason".into(),
                })));
            }
        }
        let (syndrome, address) = (exit.exception.syndrome, exit.exception.physical_address);
        // Memory that is just being replaced for the balloon: the same again finds it.
        if is_untranslated(syndrome) && self.machine.slots.has(address) {
            return Ok(None);
        }
        match Trap::decode(syndrome) {
            Trap::Hypercall => self.power_call(),
            Trap::SecureCall => {
                self.raw.set_reg(Reg::X0, NOT_SUPPORTED)?;
                self.skip().map(|()| None)
            }
            Trap::SystemRegister(access) => self.system_register(access).map(|()| None),
            Trap::Wait | Trap::Maintenance => self.skip().map(|()| None),
            Trap::Data(access) if access.write => {
                self.buffer = self.general(access.register)?.to_le_bytes();
                self.skip()?;
                let size = access.size;
                Ok(Some(Exit::Write { address, size }))
            }
            Trap::Data(access) => {
                self.load = Some(access);
                self.buffer = [0; 8];
                let size = access.size;
                Ok(Some(Exit::Read { address, size }))
            }
            Trap::Opaque => {
                self.machine.opaque.fetch_add(1, Ordering::Relaxed);
                let pc = self.raw.get_reg(Reg::PC)?;
                tracing::error!(
                    "A guest's access to {address:#x} at {pc:#x} can't be carried out: the \
                     processor does not say what it does (syndrome {syndrome:#x})"
                );
                Ok(Some(Exit::Fault(Fault::Emulation {
                    suberror: 0,
                    details: vec![syndrome, address, pc],
                })))
            }
            Trap::Fetch => Ok(Some(Exit::Fault(Fault::Memory {
                address,
                size: INSTRUCTION,
            }))),
            Trap::Other(class) => Ok(Some(Exit::Fault(Fault::Unexpected {
                what: format!("of exception class {class:#x} (syndrome {syndrome:#x})"),
            }))),
        }
    }

    fn power_call(&mut self) -> Answer<Option<Exit>> {
        let mut arguments = [0; 4];
        for (argument, register) in arguments.iter_mut().zip(GENERAL) {
            *argument = self.raw.get_reg(register)?;
        }
        let call = Call::decode(arguments);
        match self.machine.processors.call(self.place, call) {
            Outcome::Return(value) => self.raw.set_reg(Reg::X0, value).map(|()| None),
            // The next turn of the loop waits.
            Outcome::Off => Ok(None),
            Outcome::SystemOff => Ok(Some(Exit::SystemOff)),
            Outcome::SystemReset => Ok(Some(Exit::SystemReset)),
        }
    }

    /// A system register that the processor has not for guests: zero, and deaf.
    fn system_register(&self, access: SystemRegister) -> Answer<()> {
        if is_news(access.encoding) {
            let verb = if access.write { "writes" } else { "reads" };
            tracing::warn!("A guest {verb} unknown system register {}", access.name());
        }
        if !access.write {
            self.set_general(access.register, 0)?;
        }
        self.skip()
    }

    fn general(&self, register: usize) -> Answer<u64> {
        GENERAL
            .get(register)
            .map_or(Ok(0), |register| self.raw.get_reg(*register))
    }

    fn set_general(&self, register: usize, value: u64) -> Answer<()> {
        GENERAL
            .get(register)
            .map_or(Ok(()), |register| self.raw.set_reg(*register, value))
    }

    fn skip(&self) -> Answer<()> {
        let pc = self.raw.get_reg(Reg::PC)?;
        self.raw.set_reg(Reg::PC, pc.wrapping_add(INSTRUCTION))
    }

    fn present(&mut self, exit: Exit) -> VcpuExit<'_> {
        match exit {
            Exit::Read { address, size } => VcpuExit::MmioRead {
                address,
                data: &mut self.buffer[..size],
            },
            Exit::Write { address, size } => VcpuExit::MmioWrite {
                address,
                data: &self.buffer[..size],
            },
            Exit::Kicked => VcpuExit::Kicked,
            Exit::SystemOff => VcpuExit::SystemOff,
            Exit::SystemReset => VcpuExit::SystemReset,
            Exit::Fault(fault) => VcpuExit::Fault(fault),
        }
    }
}
