//! Emulated devices and the buses they sit on. Nothing here knows which hypervisor runs the guest.

pub mod bus;
pub mod power;
pub mod serial;
pub mod virtio;
