//! An embeddable virtual machine monitor.
//!
//! A [`Vm`] is built from a [`VmConfig`], started once and waited for:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use supermachine_vmm::{Vm, VmConfig};
//!
//! let config = VmConfig::new(std::fs::File::open("vmlinux")?);
//! let running = Vm::new(config)?.start()?;
//! println!("the guest ended: {}", running.wait());
//! # Ok(())
//! # }
//! ```
//!
//! The crate knows nothing of containers. [`control`] is the boundary behind which the runtime keeps
//! a VM in a process of its own.

// `unsafe` lives in few modules; each opens with `#![allow(unsafe_code)]`.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod arch;
pub mod child;
mod config;
pub mod control;
pub mod devices;
mod error;
mod exit;
pub mod hypervisor;
pub mod jail;
mod machine;
pub mod memory;
pub mod snapshot;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vcpu;

pub use config::{DiskConfig, VmConfig};
pub use error::{Error, PauseError, SaveError};
pub use exit::Exit;
pub use machine::{RestoreConfig, RunningVm, Vm};

/// Compiles what the README shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
