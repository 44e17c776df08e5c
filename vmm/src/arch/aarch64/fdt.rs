//! The device tree, by which a kernel finds everything (Documentation/devicetree/bindings).

use std::ops::Range;

use vm_fdt::{Error, FdtWriter};

use super::{Gic, Platform, SEED_LEN, layout};

type Result<T> = std::result::Result<T, Error>;

/// Handles by which nodes refer to others.
const GIC_HANDLE: u32 = 1;
const CLOCK_HANDLE: u32 = 2;

/// First cell of an interrupt: shared, or a processor's own.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
/// Last cell: what the line does.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Private interrupts of the architected timer: secure, non-secure, virtual, hypervisor.
const TIMER: [u32; 4] = [13, 14, 11, 10];
/// The GIC's own, for hypervisors in the guest.
const MAINTENANCE: u32 = 9;

/// What drives the PL011; the frequency is not looked at beyond its baud rate.
const CLOCK_HZ: u32 = 24_000_000;

/// What the tree says beside the platform.
#[derive(Debug)]
pub(super) struct Choices<'a> {
    pub(super) ram: Range<u64>,
    /// Address and bytes.
    pub(super) initramfs: Option<(u64, u64)>,
    pub(super) command_line: &'a str,
    /// Entropy: the first bytes place the kernel, the rest it mixes in before anything runs.
    pub(super) seed: &'a [u8; SEED_LEN],
}

/// Writes the tree.
pub(super) fn write(platform: Platform, choices: &Choices<'_>) -> Result<Vec<u8>> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_HANDLE)?;
    chosen(&mut fdt, platform, choices)?;
    memory(&mut fdt, &choices.ram)?;
    processors(&mut fdt, platform.vcpus)?;
    firmware(&mut fdt)?;
    gic(&mut fdt, platform)?;
    timer(&mut fdt, platform)?;
    if platform.serial {
        serial(&mut fdt)?;
    }
    for slot in 0..platform.virtio_devices {
        virtio(&mut fdt, platform, slot)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, platform: Platform, choices: &Choices<'_>) -> Result<()> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", choices.command_line)?;
    if platform.serial {
        fdt.property_string("stdout-path", &format!("/{}", serial_name()))?;
    }
    if let Some((start, size)) = choices.initramfs {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", start + size)?;
    }
    // The kernel wipes both once it has read them. Each has its own bytes.
    let (place, entropy) = choices.seed.split_at(8);
    fdt.property("kaslr-seed", place)?;
    fdt.property("rng-seed", entropy)?;
    fdt.end_node(node)
}

fn memory(fdt: &mut FdtWriter, ram: &Range<u64>) -> Result<()> {
    let node = fdt.begin_node(&format!("memory@{:x}", ram.start))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[ram.start, ram.end - ram.start])?;
    fdt.end_node(node)
}

fn processors(fdt: &mut FdtWriter, count: u32) -> Result<()> {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for affinity in (0..count).map(layout::affinity) {
        let node = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", affinity)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(node)
}

fn firmware(fdt: &mut FdtWriter) -> Result<()> {
    let node = fdt.begin_node("psci")?;
    let versions = vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()];
    fdt.property_string_list("compatible", versions)?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

fn gic(fdt: &mut FdtWriter, platform: Platform) -> Result<()> {
    let node = fdt.begin_node(&format!("intc@{:x}", layout::GIC_DISTRIBUTOR))?;
    let (compatible, interface) = match platform.gic {
        Gic::V2 => (
            "arm,cortex-a15-gic",
            [layout::GIC_CPU, layout::GIC_CPU_SIZE],
        ),
        Gic::V3 => (
            "arm,gic-v3",
            [
                layout::GIC_REDISTRIBUTORS,
                u64::from(platform.vcpus) * layout::GIC_REDISTRIBUTOR_SIZE,
            ],
        ),
    };
    let distributor = [layout::GIC_DISTRIBUTOR, distributor_size(platform.gic)];
    fdt.property_string("compatible", compatible)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_array_u64("reg", &[distributor, interface].concat())?;
    let maintenance = [PRIVATE, MAINTENANCE, LEVEL_HIGH | whom(platform)];
    fdt.property_array_u32("interrupts", &maintenance)?;
    fdt.property_phandle(GIC_HANDLE)?;
    fdt.end_node(node)
}

/// A GICv2 has a page of distributor.
fn distributor_size(gic: Gic) -> u64 {
    match gic {
        Gic::V2 => 0x1000,
        Gic::V3 => layout::GIC_DISTRIBUTOR_SIZE,
    }
}

/// A GICv2's private interrupts name the processors they are for, one bit for each.
fn whom(platform: Platform) -> u32 {
    match platform.gic {
        Gic::V2 => ((1 << platform.vcpus.min(8)) - 1) << 8,
        Gic::V3 => 0,
    }
}

fn timer(fdt: &mut FdtWriter, platform: Platform) -> Result<()> {
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_null("always-on")?;
    let flags = LEVEL_HIGH | whom(platform);
    let interrupts = TIMER.map(|number| [PRIVATE, number, flags]).concat();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.end_node(node)
}

fn serial_name() -> String {
    format!("pl011@{:x}", layout::PL011)
}

fn serial(fdt: &mut FdtWriter) -> Result<()> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", CLOCK_HZ)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK_HANDLE)?;
    fdt.end_node(node)?;

    let node = fdt.begin_node(&serial_name())?;
    let compatible = vec!["arm,pl011".into(), "arm,primecell".into()];
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_array_u64("reg", &[layout::PL011, layout::PL011_SIZE])?;
    fdt.property_array_u32("interrupts", &[SHARED, layout::PL011_SPI, LEVEL_HIGH])?;
    fdt.property_array_u32("clocks", &[CLOCK_HANDLE, CLOCK_HANDLE])?;
    let names = vec!["uartclk".into(), "apb_pclk".into()];
    fdt.property_string_list("clock-names", names)?;
    fdt.end_node(node)
}

fn virtio(fdt: &mut FdtWriter, platform: Platform, slot: u32) -> Result<()> {
    let address = layout::virtio_address(slot);
    let node = fdt.begin_node(&format!("virtio_mmio@{address:x}"))?;
    fdt.property_string("compatible", "virtio,mmio")?;
    fdt.property_array_u64("reg", &[address, layout::VIRTIO_STRIDE])?;
    let trigger = if platform.levels {
        LEVEL_HIGH
    } else {
        EDGE_RISING
    };
    let interrupt = [SHARED, layout::virtio_pin(slot), trigger];
    fdt.property_array_u32("interrupts", &interrupt)?;
    fdt.property_null("dma-coherent")?;
    fdt.end_node(node)
}
