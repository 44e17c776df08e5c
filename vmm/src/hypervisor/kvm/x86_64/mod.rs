//! KVM on x86_64: platform devices, CPUID, the first state of a vCPU.

mod calls;
mod processor;
mod state;
#[cfg(test)]
pub(super) mod tests;

use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_X86_QUIRK_LINT0_REENABLED, KvmIrqRouting, Msrs, kvm_cpuid_entry2, kvm_enable_cap, kvm_fpu,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_msr_entry, kvm_regs, kvm_run, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{Fault, HypervisorError, call, new_vm};
use crate::arch::x86_64::{CODE_SELECTOR, DATA_SELECTOR, Entry, GDT, Leaf, layout};
use crate::arch::{CpuCaps, VcpuSetup};

pub(crate) use calls::{RUN_VCPU, SAVE_VCPU, SAVE_VM};
pub(super) use state::{Extent, restore_vcpu, save_vcpu};
pub use state::{VcpuState, VmState};

/// What nothing here works without.
pub(super) const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const INDEXED: u32 = 1;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with nothing but its always-one bit: interrupts are off.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Without it Linux on Intel takes string instructions for slow.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back, as firmware leaves it.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

pub(super) fn cpu_caps(kvm: &Kvm, extent: &Extent) -> Result<CpuCaps, HypervisorError> {
    let supported = extent.cpuid().iter();
    let cpuid = supported
        .map(|entry| Leaf {
            function: entry.function,
            index: entry.index,
            indexed: entry.flags & INDEXED != 0,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
        .collect();
    Ok(CpuCaps {
        cpuid,
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
    })
}

pub(super) fn create_vm(kvm: &Kvm, _: &Extent) -> Result<(VmFd, Platform), HypervisorError> {
    let fd = new_vm(kvm)?;
    create_platform(&fd)?;
    Ok((fd, Platform))
}

/// What of a VM has no descriptor of its own here: its interrupt controllers and clocks.
#[derive(Debug)]
pub(super) struct Platform;

#[allow(clippy::unused_self, reason = "other architectures' have something")]
impl Platform {
    pub(super) fn init_vcpu(&self, _: &VmFd, _: &VcpuFd, _: u32) -> Result<(), HypervisorError> {
        Ok(())
    }

    pub(super) fn complete(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    pub(super) fn save(&self, vm: &VmFd) -> Result<VmState, HypervisorError> {
        state::save_vm(vm)
    }

    pub(super) fn restore(&self, vm: &VmFd, state: &VmState) -> Result<(), HypervisorError> {
        state::restore_vm(vm, state)
    }

    /// Sets the level of a pin's line.
    pub(super) fn set_line(
        &self,
        vm: &VmFd,
        pin: u32,
        high: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        vm.set_irq_line(pin, high)
    }
}

/// Tells a guest that it was kept from running.
pub(super) fn resumed(fd: &VcpuFd) {
    if let Err(error) = fd.kvmclock_ctrl() {
        // EINVAL: the guest doesn't use the clock that carries the news.
        tracing::debug!(%error, "a guest was not told that it had been paused");
    }
}

/// What an exit means that kvm-ioctls has no name for.
pub(super) fn other_exit(number: u32, _: *const kvm_run) -> Fault {
    Fault::Unexpected {
        what: format!("number {number}"),
    }
}

/// Interrupt controllers. No PIT: with kvm-clock and the TSC deadline timer nobody needs one.
fn create_platform(vm: &VmFd) -> Result<(), HypervisorError> {
    // The pages lie in the hole, out of everybody's way.
    let tss = usize::try_from(layout::TSS).unwrap_or(usize::MAX);
    vm.set_tss_address(tss).map_err(call("KVM_SET_TSS_ADDR"))?;
    // No PIC either. It comes with the chip, so its ways are closed: no pin leads to it, and LINT0,
    // which it would interrupt through, stays masked. Linux believes what it finds there.
    let quirks = kvm_enable_cap {
        cap: KVM_CAP_DISABLE_QUIRKS,
        args: [u64::from(KVM_X86_QUIRK_LINT0_REENABLED), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&quirks)
        .map_err(call("KVM_ENABLE_CAP(KVM_CAP_DISABLE_QUIRKS)"))?;
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    let pins: Vec<_> = (0..layout::PINS).map(ioapic_route).collect();
    let too_many = |_| HypervisorError::Call {
        call: "KVM_SET_GSI_ROUTING",
        source: std::io::Error::from_raw_os_error(libc::E2BIG),
    };
    let routing = KvmIrqRouting::from_entries(&pins).map_err(too_many)?;
    vm.set_gsi_routing(&routing)
        .map_err(call("KVM_SET_GSI_ROUTING"))
}

/// Interrupt `pin` is that pin of the I/O APIC and nothing else.
fn ioapic_route(pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip {
                irqchip: KVM_IRQCHIP_IOAPIC,
                pin,
            },
        },
        ..Default::default()
    }
}

pub(super) fn boot(fd: &VcpuFd, setup: &VcpuSetup) -> Result<(), HypervisorError> {
    set_cpuid(fd, &setup.cpuid)?;
    set_msrs(fd)?;
    match setup.entry {
        Some(entry) => set_entry(fd, entry),
        None => Ok(()),
    }
}

fn set_cpuid(fd: &VcpuFd, leaves: &[Leaf]) -> Result<(), HypervisorError> {
    let entries: Vec<kvm_cpuid_entry2> = leaves
        .iter()
        .map(|leaf| kvm_cpuid_entry2 {
            function: leaf.function,
            index: leaf.index,
            flags: if leaf.indexed { INDEXED } else { 0 },
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        })
        .collect();
    let too_many = |_| HypervisorError::Call {
        call: "KVM_SET_CPUID2",
        source: std::io::Error::from_raw_os_error(libc::E2BIG),
    };
    let cpuid = CpuId::from_entries(&entries).map_err(too_many)?;
    fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))
}

fn set_msrs(fd: &VcpuFd) -> Result<(), HypervisorError> {
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let refused = || HypervisorError::Call {
        call: "KVM_SET_MSRS",
        source: std::io::Error::from_raw_os_error(libc::EINVAL),
    };
    let msrs = Msrs::from_entries(&entries).map_err(|_| refused())?;
    let set = fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
    if set == entries.len() {
        Ok(())
    } else {
        Err(refused())
    }
}

/// 64-bit mode, paging on, flat segments, interrupts off (boot.rst, "64-bit Boot Protocol").
fn set_entry(fd: &VcpuFd, entry: Entry) -> Result<(), HypervisorError> {
    let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    sregs.cs = segment(CODE_SELECTOR);
    let data = segment(DATA_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = entry.gdt;
    sregs.gdt.limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(0);
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = entry.cr3;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;

    let regs = kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rflags: RFLAGS,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    // As after FINIT, with all exceptions masked.
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    fd.set_fpu(&fpu).map_err(call("KVM_SET_FPU"))
}

/// The descriptor `selector` names in [`GDT`], unpacked (Intel SDM 3, 3.4.5).
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT.get(usize::from(selector / 8)).copied().unwrap_or(0);
    let bits = |from: u32, count: u32| ((descriptor >> from) & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: 0,
        // Both are flat and page-granular.
        limit: u32::MAX,
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}
