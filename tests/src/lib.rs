//! What the end-to-end tests, the demo and the bench share: a containerd of their own, and `ctr`
//! driven as a user would; and a shim driven as containerd would.
//!
//! Everything here works with any runtime, so that a test can be proven against runc first.

#![forbid(unsafe_code)]

pub mod archive;
pub mod bundle;
pub mod containerd;
pub mod ctr;
mod daemon;
pub mod disk;
pub mod docker;
pub mod fifo;
pub mod host;
pub mod initramfs;
pub mod program;
pub mod runc;
pub mod shim;
pub mod step;
pub mod terminal;
pub mod traces;
pub mod work;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The shim under test, as users name it.
pub const RUNTIME: &str = "io.containerd.supermachine.v2";
/// The runtime that proves the tests.
pub const RUNC: &str = "io.containerd.runc.v2";
/// The image most tests run.
pub const BUSYBOX: &str = "supermachine.test/busybox:latest";
/// A distribution's image: glibc, bash, many files.
pub const DEBIAN: &str = "supermachine.test/debian:12";

/// Asks until the answer is yes, for what no event announces.
///
/// # Errors
/// Names `what` when the deadline passes.
pub fn until(
    what: &str,
    deadline: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    loop {
        if holds().with_context(|| format!("waiting for {what}"))? {
            return Ok(());
        }
        anyhow::ensure!(
            start.elapsed() < deadline,
            "{what}: not within {deadline:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
