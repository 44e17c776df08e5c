//! The firmware tables: RSDP, XSDT, FADT, MADT, DSDT (ACPI 6.5).
//!
//! The platform is hardware-reduced: no SCI, no PM timer, no fixed events, so a kernel finds nothing
//! it has to probe for. Power-off and reset go through the FADT's sleep control and reset registers,
//! which Linux knows since 3.x.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use super::{CpuCaps, layout};
use crate::arch::image::LoadError;
use crate::memory::GuestMemory;

const OEM: [u8; 6] = *b"SUPERM";
const TABLE: [u8; 8] = *b"SUPERMVM";

/// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): no VGA, no ASPM, no CMOS RTC; the i8042 bit stays clear.
const BOOT_ARCH: u16 = VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS | CMOS_RTC_NOT_PRESENT;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// SLP_TYP of the S5 state, in `_S5` and in what the guest writes to the sleep control register.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
/// Sleep control register (ACPI 6.5, 4.8.3.7): SLP_TYP in bits 2 to 4, SLP_EN in bit 5.
pub(crate) const SLEEP_ENABLE: u8 = 1 << 5;
/// What the guest writes to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Platform {
    pub(crate) vcpus: u32,
    pub(crate) virtio_devices: u32,
    pub(crate) com1: bool,
}

impl Platform {
    pub(crate) fn new(_: &CpuCaps, vcpus: u32, virtio_devices: u32, com1: bool) -> Self {
        Self {
            vcpus,
            virtio_devices,
            com1,
        }
    }

    /// Of a machine like most.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn ordinary() -> Self {
        Self {
            vcpus: 1,
            virtio_devices: 2,
            com1: true,
        }
    }
}

/// Writes all tables; answers where the RSDP is.
pub(crate) fn write(memory: &GuestMemory, platform: Platform) -> Result<GuestAddress, LoadError> {
    let mut place = Place {
        memory,
        next: layout::ACPI.0 + Rsdp::len().next_multiple_of(16) as u64,
    };

    let dsdt = place.put(&dsdt(platform))?;
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt.0)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.sleep_control_reg = port(layout::POWER);
    fadt.sleep_status_reg = port(layout::POWER + 1);
    fadt.reset_reg = port(layout::POWER + 2);
    fadt.reset_value = RESET_VALUE;
    let fadt = place.put(&fadt.finalize())?;
    let madt = place.put(&madt(platform.vcpus))?;

    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    let xsdt = place.put(&xsdt)?;
    place.put_at(layout::ACPI, &Rsdp::new(OEM, xsdt.0))?;
    Ok(layout::ACPI)
}

/// Lays tables out one after the other.
struct Place<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<GuestAddress, LoadError> {
        let address = GuestAddress(self.next);
        let len = self.put_at(address, table)?;
        self.next = (self.next + len as u64).next_multiple_of(16);
        Ok(address)
    }

    fn put_at(&self, address: GuestAddress, table: &dyn Aml) -> Result<usize, LoadError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let available = usize::try_from(layout::ACPI_END - address.0).unwrap_or(0);
        if bytes.len() > available {
            return Err(LoadError::Tables {
                tables: "ACPI tables",
                needed: bytes.len(),
                available,
            });
        }
        self.memory.write_slice(&bytes, address)?;
        Ok(bytes.len())
    }
}

fn port(number: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(number),
    )
}

fn madt(vcpus: u32) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        1,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for index in 0..vcpus {
        // At most 254 vCPUs (`MAX_VCPUS`), so an id always fits the 8 bits of this structure.
        let id = u8::try_from(index).unwrap_or(u8::MAX);
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(platform: Platform) -> Sdt {
    let mut body = Vec::new();
    // \_S5: what to write to the sleep control register to switch off.
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);

    let mut devices = Vec::new();
    if platform.com1 {
        com1(&mut devices);
    }
    for slot in 0..platform.virtio_devices {
        virtio(slot, &mut devices);
    }
    body.extend(aml::Scope::raw("_SB_".into(), devices));

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    table.append_slice(&body);
    table
}

fn com1(sink: &mut Vec<u8>) {
    aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::COM1, layout::COM1, 1, 8),
                    &aml::Interrupt::new(true, true, false, false, layout::COM1_PIN),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// A virtio-mmio device as Linux binds it by its id `LNRO0005`.
fn virtio(slot: u32, sink: &mut Vec<u8>) {
    // The window ends below the I/O APIC, so the address fits.
    let base = u32::try_from(layout::virtio_address(slot)).unwrap_or(u32::MAX);
    let stride = layout::VIRTIO_STRIDE as u32;
    aml::Device::new(
        aml::Path::new(&format!("V{slot:03X}")),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &slot),
            // Memory is coherent: without this Linux refuses DMA on some paths.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base, stride),
                    &aml::Interrupt::new(true, true, false, true, layout::virtio_pin(slot)),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}
