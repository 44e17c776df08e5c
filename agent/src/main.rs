//! `/init` of a supermachine guest; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A helper of an agent that is already running, or the agent itself.
    supermachine_agent::helper_main().unwrap_or_else(supermachine_agent::boot::main)
}
