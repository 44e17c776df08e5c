//! What the end-to-end tests, the demo and the bench share: a containerd of their own, and `ctr`
//! driven as a user would.
//!
//! Everything here works with any runtime, so that a test can be proven against runc first.

#![forbid(unsafe_code)]

pub mod containerd;
pub mod ctr;
pub mod step;

/// The shim under test, as users name it.
pub const RUNTIME: &str = "io.containerd.supermachine.v2";
/// The image most tests run.
pub const BUSYBOX: &str = "supermachine.test/busybox:latest";
/// A distribution's image: glibc, bash, many files.
pub const DEBIAN: &str = "supermachine.test/debian:12";
