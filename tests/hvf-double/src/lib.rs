//! A double of Apple's Hypervisor.framework, for tests of the VMM's backend on hosts without it.
//!
//! It defines the `hv_*` functions that the backend calls, so linking it makes the real backend run:
//! a vCPU plays a script of exits instead of a guest, and everything done to VM, memory, interrupt
//! controller and registers is on record. It keeps the framework's rules as far as they are known:
//! one VM in a process, the interrupt controller before any vCPU, whole pages, unmapping only what
//! was mapped as one, registers only on a vCPU's own thread. It is never shipped.

#![allow(unsafe_code)]
#![cfg(not(target_os = "macos"))]

mod gic;
mod session;
mod vcpu;
mod vm;

pub use applevisor_sys;
pub use session::{MemoryCall, Session, Step};
