//! Apple's Hypervisor.framework on arm64, macOS 15 and later.
//!
//! A process has one VM. Its interrupt controller is the framework's GICv3, and a guest's WFI and
//! timers stay in the kernel; power calls (PSCI) and device memory come to us. All calls but one go
//! through `applevisor`; `memory` maps pages of our own, which that crate would allocate itself.
//!
//! The module has nothing of macOS beyond those functions, so that its tests run it over a double
//! of them on any host.

#![allow(unsafe_code)]

mod exit;
mod memory;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod vcpu;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use applevisor::error::HypervisorError as HvError;
use applevisor::gic::{GicConfig, GicIntId};
use applevisor::vcpu::Vcpu;
use applevisor::vm::{GicEnabled, VirtualMachine, VirtualMachineConfig, VirtualMachineInstance};

use super::{Binding, Caps, Hypervisor, HypervisorError, IrqLine, VmBackend};
use crate::arch::aarch64::psci::Processors;
use crate::arch::aarch64::{CpuCaps, Gic, layout};
use crate::memory::StageTwo;
use crate::sys::doorbell::Doorbell;
use memory::{Pieces, Slots};
pub use state::{VcpuState, VmState};
pub use vcpu::{HvfKicker, HvfSeed, HvfVcpu};

/// The framework.
#[derive(Debug)]
pub struct Hvf {
    caps: Caps<CpuCaps>,
}

impl Hypervisor for Hvf {
    type Vm = HvfVm;
    type Cpu = CpuCaps;

    fn open() -> Result<Self, HypervisorError> {
        let max_vcpus = Vcpu::get_max_count().map_err(call("hv_vm_get_max_vcpu_count"))?;
        let cpu = CpuCaps {
            gic: Gic::V3,
            levels: true,
        };
        Ok(Self {
            caps: Caps { max_vcpus, cpu },
        })
    }

    fn caps(&self) -> &Caps<CpuCaps> {
        &self.caps
    }

    fn create_vm(&self) -> Result<HvfVm, HypervisorError> {
        check_layout()?;
        let mut config = VirtualMachineConfig::new();
        // The default may end below the memory of a large host.
        let bits = VirtualMachineConfig::get_max_ipa_size()
            .map_err(call("hv_vm_config_get_max_ipa_size"))?;
        config
            .set_ipa_size(bits)
            .map_err(call("hv_vm_config_set_ipa_size"))?;
        let mut gic = GicConfig::new();
        gic.set_distributor_base(layout::GIC_DISTRIBUTOR)
            .map_err(call("hv_gic_config_set_distributor_base"))?;
        gic.set_redistributor_base(layout::GIC_REDISTRIBUTORS)
            .map_err(call("hv_gic_config_set_redistributor_base"))?;
        // Before any vCPU: one that exists earlier would have no redistributor.
        let vm = VirtualMachine::with_gic(config, gic).map_err(|error| match error {
            HvError::Denied => HypervisorError::NotEntitled,
            HvError::Busy => HypervisorError::OneVm,
            error => call("hv_vm_create")(error),
        })?;
        Ok(HvfVm {
            machine: Arc::new(Machine {
                instance: RwLock::new(Some(vm)),
                processors: Processors::default(),
                epoch: Mutex::new(counter()),
                late: Mutex::new(None),
                opaque: AtomicU64::new(0),
                slots: Slots::default(),
            }),
        })
    }
}

/// Compares what the framework's interrupt controller is with what the guest will be told.
fn check_layout() -> Result<(), HypervisorError> {
    let size =
        |name, found: Result<usize, HvError>| found.map(|found| found as u64).map_err(call(name));
    let fits = |what, found: u64, most: u64| {
        if found <= most {
            return Ok(());
        }
        let expected = most;
        Err(HypervisorError::Unsuitable {
            what,
            found,
            expected,
        })
    };
    let distributor = size(
        "hv_gic_get_distributor_size",
        GicConfig::get_distributor_size(),
    )?;
    fits(
        "size of the GIC's distributor",
        distributor,
        layout::GIC_DISTRIBUTOR_SIZE,
    )?;
    let redistributor = size(
        "hv_gic_get_redistributor_size",
        GicConfig::get_redistributor_size(),
    )?;
    fits(
        "size of a GIC redistributor",
        redistributor,
        layout::GIC_REDISTRIBUTOR_SIZE,
    )?;
    let region = size(
        "hv_gic_get_redistributor_region_size",
        GicConfig::get_redistributor_region_size(),
    )?;
    fits(
        "size of all GIC redistributors",
        region,
        layout::GIC_REDISTRIBUTORS_END - layout::GIC_REDISTRIBUTORS,
    )?;
    let (base, count) =
        GicConfig::get_spi_interrupt_range().map_err(call("hv_gic_get_spi_interrupt_range"))?;
    fits(
        "first shared interrupt",
        base.into(),
        layout::SPI_BASE.into(),
    )?;
    fits(
        "last shared interrupt that is needed",
        layout::INTERRUPTS.into(),
        u64::from(base) + u64::from(count),
    )?;
    let timer =
        GicConfig::get_intid(GicIntId::EL1_VIRTUAL_TIMER).map_err(call("hv_gic_get_intid"))?;
    if timer != VIRTUAL_TIMER {
        return Err(HypervisorError::Unsuitable {
            what: "interrupt of the virtual timer",
            found: timer.into(),
            expected: VIRTUAL_TIMER.into(),
        });
    }
    Ok(())
}

/// The virtual timer's interrupt, which the device tree counts from 16.
const VIRTUAL_TIMER: u32 = 27;

/// Names the call that failed.
fn call(name: &'static str) -> impl Fn(HvError) -> HypervisorError {
    move |error| HypervisorError::Call {
        call: name,
        source: io::Error::other(error),
    }
}

/// What a VM's parts share. Whoever is left when the VM has gone finds it gone.
#[derive(Debug)]
struct Machine {
    instance: RwLock<Option<VirtualMachineInstance<GicEnabled>>>,
    processors: Processors,
    /// What the host's counter showed when the guest's was at 0: one for all vCPUs, lest their
    /// clocks disagree.
    epoch: Mutex<u64>,
    /// What the interrupt controller is to hold once all vCPUs are there.
    late: Mutex<Option<Late>>,
    /// Accesses of the guest whose syndrome did not say what they do.
    opaque: AtomicU64,
    slots: Slots,
}

/// An interrupt controller before it has been restored.
#[derive(Debug)]
struct Late {
    gic: Vec<u8>,
    /// Levels of lines that were set since.
    lines: Vec<(u32, bool)>,
}

impl Machine {
    /// Calls the VM, unless it has gone.
    fn with<T>(
        &self,
        f: impl FnOnce(&VirtualMachineInstance<GicEnabled>) -> Result<T, HvError>,
    ) -> Result<T, HvError> {
        let instance = self.instance.read().unwrap_or_else(PoisonError::into_inner);
        instance.as_ref().map_or(Err(HvError::NoDevice), f)
    }

    fn late(&self) -> MutexGuard<'_, Option<Late>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn epoch(&self) -> u64 {
        *self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's counter, as `CNTVOFF_EL2` is subtracted from it.
#[cfg(target_arch = "aarch64")]
fn counter() -> u64 {
    let count: u64;
    // SAFETY: reads a register that every process may read.
    unsafe {
        std::arch::asm!("isb", "mrs {}, cntvct_el0", out(reg) count, options(nomem, nostack))
    };
    count
}

/// Where there is no such counter, there is only the double, whose time stands still.
#[cfg(not(target_arch = "aarch64"))]
fn counter() -> u64 {
    1 << 40
}

/// A VM of the framework.
#[derive(Debug)]
pub struct HvfVm {
    machine: Arc<Machine>,
}

impl VmBackend for HvfVm {
    type Seed = HvfSeed;
    type Line = HvfLine;
    type State = VmState;

    unsafe fn map(
        &self,
        slot: u32,
        guest: u64,
        host: *mut u8,
        len: u64,
    ) -> Result<(), HypervisorError> {
        // SAFETY: the caller keeps the memory mapped for as long as the slot lives.
        unsafe { self.machine.slots.map(slot, guest, host, len) }.map_err(call("hv_vm_map"))
    }

    fn unmap(&self, slot: u32) -> Result<(), HypervisorError> {
        let unmapped = self.machine.slots.unmap(slot);
        unmapped.map_err(call("hv_vm_unmap"))
    }

    fn stage_two(&self) -> Option<Box<dyn StageTwo>> {
        Some(Box::new(Pieces(Arc::clone(&self.machine))))
    }

    fn create_vcpu(&self, index: u32) -> Result<HvfSeed, HypervisorError> {
        Ok(HvfSeed::new(Arc::clone(&self.machine), index))
    }

    /// The framework makes vCPUs as they are bound.
    fn bound(&self) -> Result<(), HypervisorError> {
        state::restore_gic(&self.machine)
    }

    fn irq_line(&self, pin: u32) -> Result<HvfLine, HypervisorError> {
        Ok(HvfLine {
            machine: Arc::clone(&self.machine),
            interrupt: layout::SPI_BASE + pin,
        })
    }

    fn save(&self) -> Result<VmState, HypervisorError> {
        state::save_vm(&self.machine)
    }

    fn restore(&self, state: &VmState) -> Result<(), HypervisorError> {
        state::restore_vm(&self.machine, state);
        Ok(())
    }

    fn bind_doorbell(&self, _: u64, _: u32, _: &Doorbell) -> Result<Binding, HypervisorError> {
        Ok(Binding::Exits)
    }
}

impl HvfVm {
    /// Accesses of the guest that could not be carried out, because the processor does not say what
    /// they do. The first one ends the VM.
    pub fn opaque_accesses(&self) -> u64 {
        self.machine.opaque.load(Ordering::Relaxed)
    }
}

impl Drop for HvfVm {
    /// The vCPUs have gone, each on its thread. The guest's memory goes before the VM, whose owner
    /// then lets go of the host's.
    fn drop(&mut self) {
        self.machine.slots.clear();
        let instance = self
            .machine
            .instance
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(instance);
    }
}

/// A wire to one shared interrupt. The guest is told of levels.
#[derive(Debug)]
pub struct HvfLine {
    machine: Arc<Machine>,
    interrupt: u32,
}

impl IrqLine for HvfLine {
    fn set(&self, high: bool) {
        if let Some(late) = &mut *self.machine.late() {
            late.lines.push((self.interrupt, high));
            return;
        }
        let set = self.machine.with(|vm| vm.gic_set_spi(self.interrupt, high));
        if let Err(error) = set {
            // Also when the VM has gone and a device has not.
            tracing::debug!(interrupt = self.interrupt, %error, "hv_gic_set_spi failed");
        }
    }

    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    fn raise(&self) {
        self.set(true);
    }

    fn lower(&self) -> bool {
        self.set(false);
        true
    }
}
