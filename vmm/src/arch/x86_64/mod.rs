//! x86_64: a PC reduced to what Linux needs of one.

mod acpi;
mod boot;
mod cpuid;
mod kernel;
pub mod layout;
#[cfg(test)]
mod tests;

use std::fs::File;

pub(crate) use acpi::{Platform, RESET_VALUE, SLEEP_ENABLE, SLEEP_TYPE_OFF};
pub use boot::Entry;
#[cfg(test)]
pub(crate) use boot::write_tables;
pub(crate) use boot::{CODE_SELECTOR, DATA_SELECTOR, GDT};
pub use cpuid::Leaf;
pub(crate) use kernel::KernelImage;

use crate::arch::image::LoadError;
use crate::memory::GuestMemory;

/// vCPUs at most: APIC id 255 means everybody, and 254 is where xAPIC-only guests stop.
pub(crate) const MAX_VCPUS: u32 = 254;
/// RAM at least: the kernel's own place and what firmware keeps below 1 MiB.
pub(crate) const MIN_MEMORY: u64 = 32 << 20;

/// Bytes of entropy a boot takes.
pub(crate) const SEED_LEN: usize = 32;
/// RAM comes in pages.
pub(crate) const MEMORY_STEP: u64 = 4096;

/// Goes before the command line, so that a caller's own word on it comes later: there is no PCI, and
/// a kernel that looks for it makes hundreds of exits.
const NO_PCI: &str = "pci=off";

/// What vCPUs of the host can be told they are.
#[derive(Clone, Debug, Default)]
pub struct CpuCaps {
    /// CPUID as the hypervisor supports it.
    pub cpuid: Vec<Leaf>,
    /// Whether the local APIC's timer can be set in TSC ticks.
    pub tsc_deadline: bool,
}

/// The state a vCPU starts in.
#[derive(Clone, Debug)]
pub struct VcpuSetup {
    /// What the vCPU says it is.
    pub cpuid: Vec<Leaf>,
    /// Where it starts; none for a vCPU the guest starts by INIT and SIPI.
    pub entry: Option<Entry>,
}

/// What a VM boots from.
pub(crate) struct BootSource<'a> {
    pub(crate) kernel: &'a KernelImage,
    pub(crate) kernel_file: &'a mut File,
    pub(crate) initramfs: Option<&'a mut File>,
    pub(crate) command_line: &'a str,
    pub(crate) seed: [u8; SEED_LEN],
}

/// Fills guest RAM with everything the boot processor needs; answers where it starts.
pub(crate) fn load(
    memory: &GuestMemory,
    source: BootSource<'_>,
    platform: Platform,
) -> Result<Entry, LoadError> {
    let loaded = source.kernel.load(memory, source.kernel_file)?;
    let initramfs = match source.initramfs {
        Some(file) => Some(kernel::load_initramfs(memory, &loaded, file)?),
        None => None,
    };
    boot::write_tables(memory)?;
    boot::write_reset_vector(memory)?;
    let rsdp = acpi::write(memory, platform)?;
    boot::write_parameters(
        memory,
        &boot::Parameters {
            kernel: &loaded,
            initramfs,
            command_line: &format!("{NO_PCI} {}", source.command_line),
            rsdp,
            seed: source.seed,
        },
    )
}

/// The state vCPU `index` of `count` starts in; the first one enters the kernel.
pub(crate) fn vcpu_setup(caps: &CpuCaps, index: u32, count: u32, entry: Entry) -> VcpuSetup {
    VcpuSetup {
        cpuid: cpuid::for_vcpu(&caps.cpuid, caps.tsc_deadline, index, count),
        entry: (index == 0).then_some(entry),
    }
}
