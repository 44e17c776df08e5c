//! Emulated devices and the buses they sit on. Nothing here knows which hypervisor runs the guest.

pub mod bus;
mod log_sink;
pub mod pl011;
#[cfg(target_arch = "x86_64")]
pub mod power;
pub mod serial;
pub mod virtio;
