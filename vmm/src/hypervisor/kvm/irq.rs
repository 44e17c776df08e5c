//! Interrupt lines into KVM's interrupt controller.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{HypervisorError, Platform, call};
use crate::hypervisor::IrqLine;

/// A wire to one pin.
#[derive(Debug)]
pub struct KvmIrqLine {
    vm: Arc<VmFd>,
    platform: Arc<Platform>,
    pin: u32,
    /// Bound to the pin: a write is an edge.
    edge: EventFd,
}

impl KvmIrqLine {
    pub(super) fn new(
        vm: Arc<VmFd>,
        platform: Arc<Platform>,
        pin: u32,
    ) -> Result<Self, HypervisorError> {
        let edge =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| HypervisorError::Call {
                call: "eventfd",
                source,
            })?;
        vm.register_irqfd(&edge, pin).map_err(call("KVM_IRQFD"))?;
        Ok(Self {
            vm,
            platform,
            pin,
            edge,
        })
    }
}

impl IrqLine for KvmIrqLine {
    fn set(&self, high: bool) {
        if let Err(error) = self.platform.set_line(&self.vm, self.pin, high) {
            tracing::error!(pin = self.pin, %error, "KVM_IRQ_LINE failed");
        }
    }

    fn pulse(&self) {
        // Fails only when 2^64 - 1 edges are pending; then one is pending.
        let _ = self.edge.write(1);
    }
}
