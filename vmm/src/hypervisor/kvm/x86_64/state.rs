//! Everything KVM holds of a vCPU and of a VM, as data: read from one that stands still, written into
//! a fresh one.

use kvm_bindings::{
    CpuId, KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::super::call;
use super::{MSR_MTRR_DEF_TYPE, processor};
use crate::hypervisor::HypervisorError;

/// MSRs in one call at most.
const CHUNK: usize = 64;
/// Bytes of `struct kvm_xsave`, of which a processor with more state has more.
const XSAVE: usize = 4096;
/// Bytes of a chip's state in `struct kvm_irqchip`.
const CHIP: usize = 512;

/// MTRRs, which some kernels leave out of `KVM_GET_MSR_INDEX_LIST` (Intel SDM 3, 12.11).
const MTRRS: [u32; 28] = [
    MSR_MTRR_DEF_TYPE,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
];

/// What this host's KVM has to tell of a vCPU.
#[derive(Debug)]
pub(in super::super) struct Extent {
    msrs: Vec<u32>,
    /// What a vCPU here can be.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Words of extended processor state beyond [`XSAVE`] bytes.
    xsave_words: usize,
}

impl Extent {
    pub(in super::super) fn read(kvm: &Kvm) -> Result<Self, HypervisorError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.extend(MTRRS);
        msrs.sort_unstable();
        msrs.dedup();
        // 0 where KVM_GET_XSAVE2 isn't known.
        let bytes = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self {
            msrs,
            cpuid: cpuid.as_slice().to_vec(),
            xsave_words: bytes.saturating_sub(XSAVE).div_ceil(size_of::<u32>()),
        })
    }

    /// What a vCPU here can be.
    pub(super) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// vCPUs at most, beside what KVM says.
    #[allow(
        clippy::unused_self,
        reason = "other architectures' depends on the host"
    )]
    pub(in super::super) fn max_vcpus(&self) -> u32 {
        u32::MAX
    }
}

/// A vCPU that stands still.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// Of as many words as the host's processor has state.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

/// What a VM has beside its vCPUs and memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    clock: kvm_clock_data,
    /// Identifier and state of each interrupt chip.
    chips: Vec<(u32, Vec<u8>)>,
}

pub(in super::super) fn save_vcpu(
    fd: &VcpuFd,
    extent: &Extent,
) -> Result<VcpuState, HypervisorError> {
    // First: a processor that waits is told so by it, and reading it delivers pending INITs.
    let mp_state = fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
    let cpuid = fd
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_CPUID2"))?;
    Ok(VcpuState {
        cpuid: cpuid.as_slice().to_vec(),
        mp_state,
        regs: fd.get_regs().map_err(call("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(call("KVM_GET_SREGS"))?,
        xsave: save_xsave(fd, extent)?,
        xcrs: fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
        debug: fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
        msrs: save_msrs(fd, &extent.msrs)?,
        events: fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        // A host that can't tell can't scale it either.
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
    })
}

/// The order matters: what a processor is goes before its registers, the local APIC's base (among
/// `sregs`) before the APIC, the APIC before the MSR of its deadline timer, and whether it waits last.
pub(in super::super) fn restore_vcpu(
    fd: &VcpuFd,
    state: &VcpuState,
    extent: &Extent,
) -> Result<(), HypervisorError> {
    // Some hypervisors of hypervisors show vCPUs more than they list: what a vCPU here shows counts.
    if processor::check(&state.cpuid, &extent.cpuid).is_err() {
        set_cpuid(fd, &extent.cpuid)?;
        let here = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_CPUID2"))?;
        processor::check(&state.cpuid, here.as_slice())?;
    }
    set_cpuid(fd, &state.cpuid)?;
    restore_tsc_rate(fd, state.tsc_khz)?;
    fd.set_regs(&state.regs).map_err(call("KVM_SET_REGS"))?;
    fd.set_sregs(&state.sregs).map_err(call("KVM_SET_SREGS"))?;
    restore_xsave(fd, &state.xsave, extent)?;
    fd.set_xcrs(&state.xcrs).map_err(call("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&state.debug)
        .map_err(call("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(&state.lapic).map_err(call("KVM_SET_LAPIC"))?;
    restore_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events)
        .map_err(call("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(state.mp_state)
        .map_err(call("KVM_SET_MP_STATE"))
}

pub(super) fn save_vm(vm: &VmFd) -> Result<VmState, HypervisorError> {
    let mut chips = Vec::new();
    for id in [
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ] {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).map_err(call("KVM_GET_IRQCHIP"))?;
        // SAFETY: every variant of the union is plain bytes within these.
        let bytes = unsafe { chip.chip.dummy };
        chips.push((id, bytes.iter().map(|byte| byte.cast_unsigned()).collect()));
    }
    let mut clock = vm.get_clock().map_err(call("KVM_GET_CLOCK"))?;
    // Said by KVM of its own host, and not to be said to another.
    clock.flags &= !KVM_CLOCK_TSC_STABLE;
    Ok(VmState { clock, chips })
}

pub(super) fn restore_vm(vm: &VmFd, state: &VmState) -> Result<(), HypervisorError> {
    for (id, bytes) in &state.chips {
        let bytes: &[u8; CHIP] = bytes
            .as_slice()
            .try_into()
            .map_err(|_| invalid("KVM_SET_IRQCHIP"))?;
        let chip = kvm_irqchip {
            chip_id: *id,
            chip: kvm_irqchip__bindgen_ty_1 {
                dummy: bytes.map(|byte| byte.cast_signed()),
            },
            ..Default::default()
        };
        vm.set_irqchip(&chip).map_err(call("KVM_SET_IRQCHIP"))?;
    }
    let clock = kvm_clock_data {
        clock: state.clock.clock,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
}

fn set_cpuid(fd: &VcpuFd, leaves: &[kvm_cpuid_entry2]) -> Result<(), HypervisorError> {
    let cpuid = CpuId::from_entries(leaves).map_err(|_| invalid("KVM_SET_CPUID2"))?;
    fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))
}

fn save_xsave(fd: &VcpuFd, extent: &Extent) -> Result<Vec<u32>, HypervisorError> {
    if extent.xsave_words == 0 {
        let plain = fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?;
        return Ok(plain.region.to_vec());
    }
    let mut xsave = Xsave::new(extent.xsave_words).map_err(|_| invalid("KVM_GET_XSAVE2"))?;
    // SAFETY: the room is what KVM_CAP_XSAVE2 says this host's KVM writes.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(call("KVM_GET_XSAVE2"))?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

fn restore_xsave(fd: &VcpuFd, words: &[u32], extent: &Extent) -> Result<(), HypervisorError> {
    let invalid = || invalid("KVM_SET_XSAVE");
    let (region, extra) = words.split_first_chunk().ok_or_else(invalid)?;
    // KVM reads as much as its host's processor has: no less may be there, and more is of a
    // processor that has what this one lacks.
    if extra.len() != extent.xsave_words {
        return Err(invalid());
    }
    let mut xsave = Xsave::new(extra.len()).map_err(|_| invalid())?;
    xsave.as_mut_slice().copy_from_slice(extra);
    // SAFETY: the length of the flexible part is left as it is.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = *region;
    // SAFETY: just checked to be as long as KVM reads.
    unsafe { fd.set_xsave2(&xsave) }.map_err(call("KVM_SET_XSAVE"))
}

fn save_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, HypervisorError> {
    let mut saved = Vec::with_capacity(indexes.len());
    let mut left = indexes;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(CHUNK)];
        let entries: Vec<_> = chunk.iter().map(|&index| msr(index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| invalid("KVM_GET_MSRS"))?;
        let read = fd.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
        saved.extend(msrs.as_slice().iter().take(read).copied());
        // It stops at the first the vCPU doesn't have: the list is of what the host could have.
        let skip = if read < chunk.len() { read + 1 } else { read };
        left = &left[skip..];
    }
    Ok(saved)
}

fn restore_msrs(fd: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), HypervisorError> {
    let mut left = saved;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(CHUNK)];
        let msrs = Msrs::from_entries(chunk).map_err(|_| invalid("KVM_SET_MSRS"))?;
        let set = fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
        let Some(refused) = chunk.get(set) else {
            left = &left[set..];
            continue;
        };
        // Some only read. That is as well, if they read the same.
        let mut now =
            Msrs::from_entries(&[msr(refused.index, 0)]).map_err(|_| invalid("KVM_GET_MSRS"))?;
        let read = fd.get_msrs(&mut now).map_err(call("KVM_GET_MSRS"))?;
        let same = now
            .as_slice()
            .first()
            .is_some_and(|now| now.data == refused.data);
        if read != 1 || !same {
            return Err(HypervisorError::Msr {
                index: refused.index,
                value: refused.data,
            });
        }
        left = &left[set + 1..];
    }
    Ok(())
}

/// A guest's time runs on at the rate it was measured at.
fn restore_tsc_rate(fd: &VcpuFd, khz: u32) -> Result<(), HypervisorError> {
    if khz == 0 || fd.get_tsc_khz().is_ok_and(|here| within_ntp(here, khz)) {
        return Ok(());
    }
    fd.set_tsc_khz(khz).map_err(call("KVM_SET_TSC_KHZ"))
}

/// Whether two rates differ by no more than the 250 ppm that clocks are steered by anyway.
fn within_ntp(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 4000 <= u64::from(a.max(b))
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// A state that no vCPU of this host can have.
fn invalid(call: &'static str) -> HypervisorError {
    HypervisorError::Call {
        call,
        source: std::io::Error::from_raw_os_error(libc::EINVAL),
    }
}
