//! The boundary between a program and its VMM process, with real processes.
//!
//! This program is the parent, the VMM child (executed again by `VmHandle::spawn`) and, where the
//! name of the VM asks for it, a child that doesn't keep to the rules.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

#[cfg(target_os = "linux")]
mod bare_metal;
#[cfg(target_os = "linux")]
mod confinement;
#[cfg(target_os = "linux")]
mod denied;
#[cfg(target_os = "linux")]
mod ends;
#[cfg(target_os = "linux")]
mod fill;
#[cfg(target_os = "linux")]
#[allow(dead_code, reason = "some are for other tests")]
#[path = "../guests/mod.rs"]
mod guests;
#[cfg(target_os = "linux")]
mod hostile;
#[cfg(target_os = "linux")]
mod snapshot;
#[cfg(target_os = "linux")]
mod support;

use std::process::ExitCode;

/// What the tests look at is Linux's: /proc, seccomp, namespaces.
#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    libtest_mimic::run(&libtest_mimic::Arguments::from_args(), Vec::new()).exit_code()
}

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    if let Some(code) = denied::child() {
        return code;
    }
    if let Some(code) = hostile::child() {
        return code;
    }
    if let Some(code) = supermachine_vmm::child::main() {
        return code;
    }
    if let Some(code) = ends::short_lived_parent() {
        return code;
    }
    let arguments = libtest_mimic::Arguments::from_args();
    let tests: Vec<libtest_mimic::Trial> = [
        hostile::tests(),
        confinement::tests(),
        denied::tests(),
        ends::tests(),
        bare_metal::tests(),
        snapshot::tests(),
        fill::tests(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&arguments, tests).exit_code()
}
