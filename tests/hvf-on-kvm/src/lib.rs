//! Apple's Hypervisor.framework on the KVM of an arm64 Linux, for tests of the VMM's backend with
//! real guests.
//!
//! It defines the `hv_*` functions that the backend calls, as `hvf-double` does, but its vCPUs run
//! guests. It is never shipped. What KVM does differently is made up for:
//!
//! - KVM answers a guest's HVC itself (before Linux 6.4, always). So at the first run each `hvc #0`
//!   in guest memory becomes a BRK, which KVM hands out; what a guest loads or writes later is not
//!   looked at, and a word of data that happens to be an `hvc #0` is changed too. These guests are
//!   ours.
//! - KVM ends a load or store itself, while the framework leaves that to its caller. So an access is
//!   reported as one of a stand-in for the real register, and KVM ends it when its caller moves the
//!   program counter past it.
//! - KVM's interrupt controller is complete only once all vCPUs are there. So it comes to life with
//!   the first run, or the first use of its registers, and there are no more vCPUs after that.
//!
//! Not done: accesses to unknown system registers and fetches where nothing is mapped do not exit,
//! because KVM gives the guest an exception for them. A load that extends a sign does not, which is
//! KVM's too.

#![allow(unsafe_code)]
#![cfg(all(target_os = "linux", target_arch = "aarch64"))]

mod exit;
mod gic;
mod hypercall;
mod registers;
mod vcpu;
mod vm;
mod world;

pub use applevisor_sys;
