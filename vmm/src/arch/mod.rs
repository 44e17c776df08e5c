//! What differs between processor architectures: memory layout, firmware tables, the state a kernel
//! expects of its first processor.

#[cfg(any(target_arch = "aarch64", test, feature = "testing"))]
pub mod aarch64;
mod image;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64 as current;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64 as current;

pub use current::{CpuCaps, VcpuSetup};
pub use image::{KernelError, LoadError};
