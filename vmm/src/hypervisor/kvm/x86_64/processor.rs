//! Whether this host's processor can go on with what a guest found on another.

use kvm_bindings::kvm_cpuid_entry2;

use super::INDEXED;
use crate::hypervisor::HypervisorError;

/// One register of a leaf.
#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Registers in which a bit is a feature: leaf, subleaf, register, and bits that are not the host's
/// to have (Intel SDM 2A, CPUID; AMD APM 3, appendix E; Linux, virt/kvm/x86/cpuid.rst).
const FEATURES: [(u32, u32, Register, u32); 17] = [
    // OSXSAVE mirrors CR4; TSC_DEADLINE KVM has but doesn't list; the hypervisor is us.
    (1, 0, Ecx, 1 << 27 | 1 << 24 | 1 << 31),
    // HTT is topology.
    (1, 0, Edx, 1 << 28),
    (7, 0, Ebx, 0),
    // OSPKE mirrors CR4.
    (7, 0, Ecx, 1 << 4),
    (7, 0, Edx, 0),
    (7, 1, Eax, 0),
    (7, 1, Ebx, 0),
    (7, 1, Edx, 0),
    (7, 2, Edx, 0),
    // What XCR0 and XSAVE can hold.
    (0xd, 0, Eax, 0),
    (0xd, 0, Edx, 0),
    (0xd, 1, Eax, 0),
    (0x8000_0001, 0, Ecx, 0),
    (0x8000_0001, 0, Edx, 0),
    (0x8000_0008, 0, Ebx, 0),
    (0x8000_0021, 0, Eax, 0),
    // KVM's own.
    (0x4000_0001, 0, Eax, 0),
];

/// Refuses a vCPU that has features this host lacks, or that is of another maker: what errata and
/// model-specific registers a kernel has settled for, it settled at its boot.
pub(super) fn check(
    vcpu: &[kvm_cpuid_entry2],
    host: &[kvm_cpuid_entry2],
) -> Result<(), HypervisorError> {
    let (theirs, ours) = (maker(vcpu), maker(host));
    if theirs != ours {
        return Err(HypervisorError::Processor {
            found: format!("is of {theirs}"),
            here: format!("is of {ours}"),
        });
    }
    for (leaf, index, register, except) in FEATURES {
        let asked = value(vcpu, leaf, index, register) & !except;
        let lacking = asked & !value(host, leaf, index, register);
        if lacking != 0 {
            return Err(HypervisorError::Processor {
                found: format!("has {lacking:#x} in {register:?} of CPUID {leaf:#x}.{index}"),
                here: "lacks that".to_owned(),
            });
        }
    }
    Ok(())
}

fn value(leaves: &[kvm_cpuid_entry2], leaf: u32, index: u32, register: Register) -> u32 {
    // Where the index means nothing, it can be anything.
    let found = leaves.iter().find(|entry| {
        entry.function == leaf && (entry.flags & INDEXED == 0 || entry.index == index)
    });
    found.map_or(0, |entry| match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    })
}

/// The twelve letters of leaf 0.
fn maker(leaves: &[kvm_cpuid_entry2]) -> String {
    let parts = [Ebx, Edx, Ecx].map(|register| value(leaves, 0, 0, register).to_le_bytes());
    let letters = parts.concat().into_iter().map(char::from);
    letters.filter(char::is_ascii_graphic).collect()
}
