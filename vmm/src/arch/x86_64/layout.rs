//! Where things are in the guest's address space.
//!
//! ```text
//! 0x0000_0500  GDT                    0x0000_7000  boot parameters (zero page)
//! 0x0000_9000  page tables            0x0002_0000  command line       0x0003_0000  setup data
//! 0x0009_fc00  end of low RAM         0x000e_0000  ACPI tables, 0x000f_fff0 reset vector
//! 0x0010_0000  kernel, initramfs      0xc000_0000  end of RAM below the hole
//! 0xd000_0000  virtio-mmio, one page for each device
//! 0xfec0_0000  IOAPIC                 0xfee0_0000  local APICs
//! 0x1_0000_0000  RAM beyond 3 GiB
//! ```

use vm_memory::GuestAddress;

/// The GDT the boot processor starts with.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct boot_params`, one page.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// PML4, page directory pointers, and one page directory for each GiB that is mapped.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line, zero-terminated.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// `struct setup_data` nodes.
pub const SETUP_DATA: GuestAddress = GuestAddress(0x3_0000);
/// End of conventional memory: the extended BIOS data area of a PC starts here.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables; also where a PC's firmware leaves the RSDP to be found.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// End of the ACPI tables at most.
pub const ACPI_END: u64 = 0xf_fff0;
/// Where a PC's processor starts after a reset, and where Linux jumps in real mode as a last resort.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// RAM from here on is free for kernel and initramfs.
pub const HIGH_RAM: u64 = 0x10_0000;
/// End of RAM below the hole.
pub const HOLE: u64 = 0xc000_0000;
/// RAM goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio device.
pub const VIRTIO: u64 = 0xd000_0000;
/// Distance between two virtio-mmio devices, and the size of each one's window.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// The I/O APIC of the hypervisor.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC of each processor.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages KVM needs on Intel processors that cannot run real mode.
pub const TSS: u64 = 0xfffb_d000;

/// First of the interrupt pins virtio devices use; those below belong to a PC's own devices.
pub const FIRST_VIRTIO_PIN: u32 = 5;
/// Pins of the I/O APIC.
pub const PINS: u32 = 24;

/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// Ports of COM1.
pub const COM1_PORTS: u16 = 8;
/// Interrupt pin of COM1.
pub const COM1_PIN: u32 = 4;
/// Sleep control, sleep status and reset registers of the FADT, in this order.
pub const POWER: u16 = 0x600;
/// Ports of the power registers.
pub const POWER_PORTS: u16 = 3;
/// The keyboard controller's command port, for guests that reset through it.
pub const I8042_COMMAND: u16 = 0x64;

/// Devices the virtio window takes: up to the I/O APIC.
pub const MAX_VIRTIO_DEVICES: u32 = 1024;

/// RAM of `size` bytes: below the hole, and beyond 4 GiB what does not fit there.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    if size <= HOLE {
        vec![(GuestAddress(0), size)]
    } else {
        vec![
            (GuestAddress(0), HOLE),
            (GuestAddress(HOLE_END), size - HOLE),
        ]
    }
}

/// The window of virtio device `slot`.
pub fn virtio_address(slot: u32) -> u64 {
    VIRTIO + u64::from(slot) * VIRTIO_STRIDE
}

/// The interrupt pin of virtio device `slot`: each its own as long as there are free ones, then
/// shared in turn. Edges survive sharing: the driver looks at each device's status on every one.
pub fn virtio_pin(slot: u32) -> u32 {
    FIRST_VIRTIO_PIN + slot % (PINS - FIRST_VIRTIO_PIN)
}
