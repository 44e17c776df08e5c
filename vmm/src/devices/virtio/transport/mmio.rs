//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).
