//! The boundary between a program and its VMM process, with real processes.
//!
//! This program is the parent, the VMM child (executed again by `VmHandle::spawn`) and, where the
//! name of the VM asks for it, a child that doesn't keep to the rules.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod bare_metal;
mod confinement;
mod denied;
mod ends;
mod hostile;
mod support;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

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
    let arguments = Arguments::from_args();
    let tests: Vec<Trial> = [
        hostile::tests(),
        confinement::tests(),
        denied::tests(),
        ends::tests(),
        bare_metal::tests(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&arguments, tests).exit_code()
}
