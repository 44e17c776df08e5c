//! How virtio devices are shown to the guest.

pub mod mmio;
