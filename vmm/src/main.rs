//! `supermachine-vmm`: the process that is a virtual machine.
//!
//! It is what a [`VmHandle`](supermachine_vmm::control::VmHandle) executes, told by its `SpawnConfig`.
//! A program of its own has nothing in it but the VMM: less to load at each start, and less to find
//! for a guest that breaks into it.

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = supermachine_vmm::child::main() {
        return code;
    }
    let text =
        "supermachine-vmm: a program that wants a VM starts this, and tells it over a socket which";
    // Where nobody reads it, the status is all there is to tell.
    let _ = writeln!(std::io::stderr(), "{text}");
    ExitCode::from(2)
}
