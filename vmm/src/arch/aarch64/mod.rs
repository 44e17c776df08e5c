//! arm64: a machine that its device tree describes whole.
//!
//! Pure code: it compiles and is tested on every host, and is used where the host is an arm64 one.

#![cfg_attr(
    not(target_arch = "aarch64"),
    allow(dead_code, unreachable_pub, reason = "there for its tests")
)]

mod fdt;
mod kernel;
pub mod layout;
pub mod psci;
#[cfg(test)]
mod tests;

use std::fs::File;

use vm_memory::{Bytes, GuestAddress};

pub use kernel::KernelImage;

use crate::arch::image::{self, LoadError};
use crate::memory::GuestMemory;

/// vCPUs at most: as many as the configuration documents.
pub(crate) const MAX_VCPUS: u32 = 254;
/// RAM at least.
pub(crate) const MIN_MEMORY: u64 = 32 << 20;

/// Bytes of entropy a boot takes: 8 that place the kernel, and 32 for its generator.
pub(crate) const SEED_LEN: usize = 40;
/// RAM comes in these: the largest page a host of this architecture may have.
pub(crate) const MEMORY_STEP: u64 = 64 << 10;

/// `COMMAND_LINE_SIZE` of arm64, its zero included.
const COMMAND_LINE_SIZE: usize = 2048;

/// The interrupt controllers there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gic {
    /// Eight processors at most.
    V2,
    /// What every current host has.
    #[default]
    V3,
}

/// What vCPUs of the host can be told they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuCaps {
    /// The interrupt controller the hypervisor makes.
    pub gic: Gic,
    /// Interrupts of virtio devices are levels, not edges.
    pub levels: bool,
}

/// How the first processor starts (booting.rst): MMU off, interrupts masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub pc: u64,
    /// The device tree.
    pub x0: u64,
}

/// The state a vCPU starts in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuSetup {
    /// By which the others and the interrupt controller know it: `MPIDR_EL1` without fixed bits.
    pub affinity: u64,
    /// Where it starts; none for a vCPU the guest starts by `CPU_ON`.
    pub entry: Option<Entry>,
}

/// What the device tree has to describe.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Platform {
    pub(crate) vcpus: u32,
    pub(crate) virtio_devices: u32,
    pub(crate) serial: bool,
    pub(crate) gic: Gic,
    /// Interrupts of virtio devices are levels, not edges.
    pub(crate) levels: bool,
}

impl Platform {
    pub(crate) fn new(caps: &CpuCaps, vcpus: u32, virtio_devices: u32, serial: bool) -> Self {
        Self {
            vcpus,
            virtio_devices,
            serial,
            gic: caps.gic,
            levels: caps.levels,
        }
    }

    /// Of a machine like most.
    #[cfg(any(test, feature = "testing"))]
    #[allow(dead_code, reason = "for the architecture that is current")]
    pub(crate) fn ordinary() -> Self {
        Self {
            vcpus: 1,
            virtio_devices: 2,
            serial: true,
            gic: Gic::V3,
            levels: false,
        }
    }
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
    let len = source.command_line.len();
    if len >= COMMAND_LINE_SIZE {
        let max = COMMAND_LINE_SIZE - 1;
        return Err(LoadError::CommandLine { len, max });
    }
    let kernel = source.kernel.load(memory, source.kernel_file)?;
    let ram_end = layout::RAM + memory.size();
    let reach = ram_end.min(layout::RAM + layout::REACH) & !(layout::DEVICE_TREE_MAX - 1);
    let tree_at = reach.saturating_sub(layout::DEVICE_TREE_MAX);
    if tree_at < kernel.end {
        return Err(LoadError::MemoryTooSmall {
            needed: kernel.end - layout::RAM + layout::DEVICE_TREE_MAX,
            available: reach.saturating_sub(layout::RAM),
        });
    }
    let initramfs = match source.initramfs {
        Some(file) => {
            let free = kernel.end..tree_at;
            Some(image::load_initramfs(memory, layout::RAM, free, file)?)
        }
        None => None,
    };
    let tree = fdt::write(
        platform,
        &fdt::Choices {
            ram: layout::RAM..ram_end,
            initramfs,
            command_line: source.command_line,
            seed: &source.seed,
        },
    )?;
    if tree.len() as u64 > layout::DEVICE_TREE_MAX {
        return Err(LoadError::Tables {
            tables: "The device tree",
            needed: tree.len(),
            available: layout::DEVICE_TREE_MAX as usize,
        });
    }
    memory.write_slice(&tree, GuestAddress(tree_at))?;
    Ok(Entry {
        pc: kernel.entry,
        x0: tree_at,
    })
}

/// Loads a kernel alone; answers its first instruction. For tests of the loader.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn load_kernel(
    memory: &GuestMemory,
    kernel: &KernelImage,
    file: &mut File,
) -> Result<u64, LoadError> {
    Ok(kernel.load(memory, file)?.entry)
}

/// The state vCPU `index` starts in; the first one enters the kernel.
pub(crate) fn vcpu_setup(_: &CpuCaps, index: u32, _: u32, entry: Entry) -> VcpuSetup {
    VcpuSetup {
        affinity: layout::affinity(index),
        entry: (index == 0).then_some(entry),
    }
}

/// A system register as an assembler takes it, `S3_0_C12_C12_5`, by op0, op1, CRn, CRm and op2 as an
/// instruction has them.
pub(crate) fn register_name(encoding: u32) -> String {
    let field = |at: u32, mask: u32| encoding >> at & mask;
    format!(
        "S{}_{}_C{}_C{}_{}",
        field(14, 3),
        field(11, 7),
        field(7, 0xf),
        field(3, 0xf),
        field(0, 7)
    )
}
