//! Requests of linux/kvm.h that a thread makes when it has few system calls left.

use crate::jail::{Rule, When, allow_if};

/// What the thread of a vCPU calls while the guest runs.
pub(crate) const RUN_VCPU: &[Rule] = &[allow_if(
    libc::SYS_ioctl,
    // KVM_RUN; KVM_IRQ_LINE, which is how a serial port's level changes.
    &[When::Is(1, 0xae80), When::Is(1, 0x4008_ae61)],
)];

/// All that saving a vCPU takes, on its own thread.
pub(crate) const SAVE_VCPU: &[Rule] = &[allow_if(
    libc::SYS_ioctl,
    &[
        // KVM_GET_MP_STATE, _VCPU_EVENTS, _ONE_REG, _REG_LIST.
        When::Is(1, 0x8004_ae98),
        When::Is(1, 0x8040_ae9f),
        When::Is(1, 0x4010_aeab),
        When::Is(1, 0xc008_aeb0),
    ],
)];

/// All that saving the rest of a VM takes.
pub(crate) const SAVE_VM: &[Rule] = &[allow_if(
    libc::SYS_ioctl,
    // KVM_GET_DEVICE_ATTR.
    &[When::Is(1, 0x4018_aee2)],
)];
