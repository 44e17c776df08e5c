//! Requests of linux/kvm.h that a thread makes when it has few system calls left.

use crate::jail::{Rule, When, allow_if};

/// What the thread of a vCPU calls while the guest runs.
pub(crate) const RUN_VCPU: &[Rule] = &[allow_if(
    libc::SYS_ioctl,
    // KVM_RUN; KVM_KVMCLOCK_CTRL, after a pause.
    &[When::Is(1, 0xae80), When::Is(1, 0xaead)],
)];

/// All that saving a vCPU takes, on its own thread.
pub(crate) const SAVE_VCPU: &[Rule] = &[allow_if(
    libc::SYS_ioctl,
    &[
        // KVM_GET_REGS, _SREGS, _MSRS, _LAPIC, _CPUID2.
        When::Is(1, 0x8090_ae81),
        When::Is(1, 0x8138_ae83),
        When::Is(1, 0xc008_ae88),
        When::Is(1, 0x8400_ae8e),
        When::Is(1, 0xc008_ae91),
        // KVM_GET_MP_STATE, _VCPU_EVENTS, _DEBUGREGS, _TSC_KHZ.
        When::Is(1, 0x8004_ae98),
        When::Is(1, 0x8040_ae9f),
        When::Is(1, 0x8080_aea1),
        When::Is(1, 0xaea3),
        // KVM_GET_XSAVE, _XCRS, _XSAVE2.
        When::Is(1, 0x9000_aea4),
        When::Is(1, 0x8188_aea6),
        When::Is(1, 0x9000_aecf),
    ],
)];

/// All that saving the rest of a VM takes.
pub(crate) const SAVE_VM: &[Rule] = &[allow_if(
    libc::SYS_ioctl,
    &[
        // KVM_GET_IRQCHIP, _PIT2, _CLOCK.
        When::Is(1, 0xc208_ae62),
        When::Is(1, 0x8070_ae9f),
        When::Is(1, 0x8030_ae7c),
    ],
)];
