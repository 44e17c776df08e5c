//! KVM on arm64: its interrupt controller, the first state of a vCPU, exits that it alone has.
//! Power calls (PSCI) are answered by KVM.

mod calls;
mod gic;
mod state;
#[cfg(test)]
pub(super) mod tests;

use std::mem::offset_of;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2,
    KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC, KVM_CAP_ARM_NISV_TO_USER,
    KVM_EXIT_ARM_NISV, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64, kvm_enable_cap, kvm_run,
    kvm_vcpu_init, user_pt_regs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{Fault, HypervisorError, call, new_vm};
use crate::arch::CpuCaps;
use crate::arch::aarch64::{Gic, VcpuSetup, layout};

pub(crate) use calls::{RUN_VCPU, SAVE_VCPU, SAVE_VM};
pub use state::{VcpuState, VmState};
pub(super) use state::{restore_vcpu, save_vcpu};

/// What nothing here works without.
pub(super) const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::DeviceCtrl, "KVM_CAP_DEVICE_CTRL"),
    (Cap::OneReg, "KVM_CAP_ONE_REG"),
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// vCPUs that a GICv2 has interfaces for.
const GICV2_VCPUS: u32 = 8;

/// What this host's KVM makes, as the first VM shows.
#[derive(Debug)]
pub(super) struct Extent {
    gic: Gic,
    /// That VM, until somebody wants one: making a second takes milliseconds.
    first: Mutex<Option<(VmFd, Platform)>>,
}

impl Extent {
    pub(super) fn read(kvm: &Kvm) -> Result<Self, HypervisorError> {
        let (fd, platform) = make_vm(kvm)?;
        Ok(Self {
            gic: platform.gic.version(),
            first: Mutex::new(Some((fd, platform))),
        })
    }

    /// vCPUs at most, beside what KVM says.
    pub(super) fn max_vcpus(&self) -> u32 {
        match self.gic {
            Gic::V2 => GICV2_VCPUS,
            Gic::V3 => u32::MAX,
        }
    }
}

#[allow(
    clippy::unnecessary_wraps,
    reason = "other architectures' ask the host"
)]
pub(super) fn cpu_caps(_: &Kvm, extent: &Extent) -> Result<CpuCaps, HypervisorError> {
    Ok(CpuCaps {
        gic: extent.gic,
        levels: false,
    })
}

pub(super) fn create_vm(kvm: &Kvm, extent: &Extent) -> Result<(VmFd, Platform), HypervisorError> {
    let first = extent
        .first
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    first.map_or_else(|| make_vm(kvm), Ok)
}

fn make_vm(kvm: &Kvm) -> Result<(VmFd, Platform), HypervisorError> {
    let fd = new_vm(kvm)?;
    // Without it KVM_RUN answers ENOSYS to an access that it can't take apart, and no address.
    if fd.check_extension_raw(KVM_CAP_ARM_NISV_TO_USER.into()) > 0 {
        fd.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_ARM_NISV_TO_USER,
            ..Default::default()
        })
        .map_err(call("KVM_ENABLE_CAP(KVM_CAP_ARM_NISV_TO_USER)"))?;
    }
    let gic = gic::Controller::create(&fd)?;
    Ok((fd, Platform { gic }))
}

/// What of a VM has a descriptor of its own.
#[derive(Debug)]
pub(super) struct Platform {
    gic: gic::Controller,
}

impl Platform {
    /// Makes a vCPU what the host's processor is; all but the first wait for the guest's `CPU_ON`.
    pub(super) fn init_vcpu(
        &self,
        vm: &VmFd,
        fd: &VcpuFd,
        index: u32,
    ) -> Result<(), HypervisorError> {
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init)
            .map_err(call("KVM_ARM_PREFERRED_TARGET"))?;
        let mut offer = |feature: u32| init.features[0] |= 1 << feature;
        offer(KVM_ARM_VCPU_PSCI_0_2);
        if index > 0 {
            offer(KVM_ARM_VCPU_POWER_OFF);
        }
        // Both or neither, says KVM.
        if vm.check_extension(Cap::ArmPtrAuthAddress) && vm.check_extension(Cap::ArmPtrAuthGeneric)
        {
            offer(KVM_ARM_VCPU_PTRAUTH_ADDRESS);
            offer(KVM_ARM_VCPU_PTRAUTH_GENERIC);
        }
        fd.vcpu_init(&init).map_err(call("KVM_ARM_VCPU_INIT"))?;
        self.gic.add_vcpu();
        Ok(())
    }

    pub(super) fn complete(&self) -> Result<(), HypervisorError> {
        self.gic.init()
    }

    pub(super) fn save(&self, _: &VmFd) -> Result<VmState, HypervisorError> {
        let gic = self.gic.save()?;
        Ok(VmState { gic })
    }

    pub(super) fn restore(&self, vm: &VmFd, state: &VmState) -> Result<(), HypervisorError> {
        for pin in self.gic.restore(&state.gic)? {
            self.set_line(vm, pin, true).map_err(call("KVM_IRQ_LINE"))?;
        }
        Ok(())
    }

    /// Sets the level of a shared interrupt's line.
    pub(super) fn set_line(
        &self,
        vm: &VmFd,
        pin: u32,
        high: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        self.gic.note_line(pin, high);
        vm.set_irq_line(line(pin), high)
    }
}

/// How `KVM_IRQ_LINE` calls a shared interrupt.
fn line(pin: u32) -> u32 {
    KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (layout::SPI_BASE + pin)
}

/// A guest has no way to be told that it was kept from running.
pub(super) fn resumed(_: &VcpuFd) {}

/// What an exit means that kvm-ioctls has no name for.
pub(super) fn other_exit(number: u32, run: *const kvm_run) -> Fault {
    if number != KVM_EXIT_ARM_NISV {
        return Fault::Unexpected {
            what: format!("number {number}"),
        };
    }
    // SAFETY: `run` points to the vCPU's run page, mapped as long as its descriptor is open, and its
    // exit reason says which field of the union is meant.
    let access = unsafe { (*run).__bindgen_anon_1.arm_nisv };
    Fault::Emulation {
        suberror: number,
        details: vec![access.fault_ipa, access.esr_iss],
    }
}

/// As booting.rst has it; KVM's reset has masked interrupts and left the MMU off.
pub(super) fn boot(fd: &VcpuFd, setup: &VcpuSetup) -> Result<(), HypervisorError> {
    let Some(entry) = setup.entry else {
        return Ok(());
    };
    let set = |register, value: u64| {
        fd.set_one_reg(core(register), &value.to_le_bytes())
            .map(|_| ())
            .map_err(call("KVM_SET_ONE_REG"))
    };
    set(offset_of!(user_pt_regs, pc), entry.pc)?;
    set(offset_of!(user_pt_regs, regs), entry.x0)
}

/// How KVM calls a register of 64 bits, by its place in `struct kvm_regs`.
fn core(offset: usize) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | (offset / 4) as u64
}
