//! The agent's calls, end to end, on this machine's own kernel: the server on a unix socket,
//! sockets for console ports, directories for disks.
//!
//! Runs as root in mount and pid namespaces of its own, with the cgroup2 hierarchy mounted there.
//! Where a test needs something that this machine lacks, it is skipped with a reason, and counted.
//! Not the usual harness: the program is its own container helper, so `main` must be ours.
//!
//!     cargo test -p supermachine-agent --test engine [-- NAME]

// Nothing here ships: a failure is a test that fails, and the results are what is printed.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod changes;
mod harness;
mod lives;
mod processes;
mod refusals;
mod roots;
mod streams;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = supermachine_agent::helper_main() {
        return code;
    }
    let all = [
        streams::ALL,
        processes::ALL,
        lives::ALL,
        refusals::ALL,
        changes::ALL,
        roots::ALL,
    ];
    harness::main(&all.concat())
}
