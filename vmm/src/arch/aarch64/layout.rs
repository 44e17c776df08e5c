//! Where things are in the guest's address space, and which interrupts they have.
//!
//! ```text
//! 0x0800_0000  GIC distributor
//! 0x0801_0000  CPU interface of a GICv2
//! 0x0900_0000  PL011
//! 0x0a00_0000  virtio-mmio, one page for each device
//! 0x1000_0000  GICv3 redistributors, 128 KiB for each vCPU
//! 0x4000_0000  RAM: kernel first; initramfs and device tree end what the kernel reaches early
//! ```

use vm_memory::GuestAddress;

/// The GIC's distributor, 64 KiB of it.
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// Bytes of the distributor.
pub const GIC_DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// The CPU interface of a GICv2.
pub const GIC_CPU: u64 = 0x0801_0000;
/// Bytes of the CPU interface.
pub const GIC_CPU_SIZE: u64 = 0x2000;
/// The PL011.
pub const PL011: u64 = 0x0900_0000;
/// Bytes of the PL011's window.
pub const PL011_SIZE: u64 = 0x1000;
/// First virtio-mmio device.
pub const VIRTIO: u64 = 0x0a00_0000;
/// Distance between two virtio-mmio devices, and the size of each one's window.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// The redistributors of a GICv3.
pub const GIC_REDISTRIBUTORS: u64 = 0x1000_0000;
/// End of the place for redistributors.
pub const GIC_REDISTRIBUTORS_END: u64 = RAM;
/// Bytes of one redistributor: its two frames of 64 KiB.
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// RAM. A multiple of 2 MiB, as the kernel's place has to be (booting.rst), and of 1 GiB, as the
/// window has to be in which it looks for its initramfs.
pub const RAM: u64 = 0x4000_0000;
/// How far from the start of RAM initramfs and device tree may be; the kernel reaches 32 GiB.
pub const REACH: u64 = 4 << 30;
/// Bytes of the device tree at most, and the alignment of its place (booting.rst).
pub const DEVICE_TREE_MAX: u64 = 2 << 20;

/// Interrupt of the PL011. Numbers of shared peripheral interrupts (SPIs), as a device tree counts
/// them: the GIC's own number is 32 more.
pub const PL011_SPI: u32 = 1;
/// First of the interrupts virtio devices use, each its own.
pub const FIRST_VIRTIO_SPI: u32 = 16;
/// What the GIC's numbers of shared peripheral interrupts start with.
pub const SPI_BASE: u32 = 32;
/// Interrupts the GIC must have.
pub const INTERRUPTS: u32 = SPI_BASE + FIRST_VIRTIO_SPI + MAX_VIRTIO_DEVICES;

/// Devices the virtio window is for.
pub const MAX_VIRTIO_DEVICES: u32 = 512;

/// RAM of `size` bytes.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    vec![(GuestAddress(RAM), size)]
}

/// The window of virtio device `slot`.
pub fn virtio_address(slot: u32) -> u64 {
    VIRTIO + u64::from(slot) * VIRTIO_STRIDE
}

/// The interrupt of virtio device `slot`.
pub fn virtio_pin(slot: u32) -> u32 {
    FIRST_VIRTIO_SPI + slot
}

/// The affinity by which vCPU `index` is known, `MPIDR_EL1` without its fixed bits: sixteen to a
/// cluster, as one software-generated interrupt reaches no more of them. KVM numbers them the same.
pub fn affinity(index: u32) -> u64 {
    let index = u64::from(index);
    (index & 0xf) | ((index >> 4) & 0xff) << 8 | ((index >> 12) & 0xff) << 16
}
