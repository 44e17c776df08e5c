//! What differs between processor architectures: memory layout, firmware tables, the state a kernel
//! expects of its first processor.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64 as current;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{CpuCaps, KernelError, LoadError, VcpuSetup};
