//! An embeddable virtual machine monitor.
//!
//! The crate knows nothing of containers. [`control`] is the boundary behind which the runtime keeps
//! a VM in a process of its own.

// `unsafe` lives in few modules; each opens with `#![allow(unsafe_code)]`.
#![deny(unsafe_code)]

pub mod arch;
pub mod child;
mod config;
pub mod control;
pub mod devices;
mod error;
pub mod hypervisor;
pub mod jail;
mod machine;
pub mod memory;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vcpu;

