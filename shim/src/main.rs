//! `containerd-shim-supermachine-v2`: containerd's Task API, each container in a microVM.
//!
//! One binary is three programs: what containerd runs to start or clean up a container ([`start`],
//! [`delete`]), the daemon that serves one container ([`daemon`]), and, re-executed by the runtime,
//! the process that writes what the container wrote into its snapshot. The virtual machine's is
//! `supermachine-vmm`.

#![forbid(unsafe_code)]

mod args;
mod bootstrap;
mod daemon;
mod delete;
mod metrics;
mod publish;
mod start;
mod task;

use std::process::ExitCode;

use args::{Args, Command};

fn main() -> ExitCode {
    // First of all, while there is one thread and nothing is open: this may be a process of the runtime's.
    if let Some(code) = supermachine_runtime::child() {
        return code;
    }
    let result = Args::parse(std::env::args().skip(1)).and_then(|args| match args.command {
        Command::Start => start::run(&args),
        Command::Delete => delete::run(&args),
        Command::Serve => daemon::run(args),
        Command::Version => bootstrap::print_version(),
        Command::Info => bootstrap::print_info(),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what a failed shim printed to the one who asked for the container.
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("{}\n", error_chain(&*error)).as_bytes(),
            );
            ExitCode::FAILURE
        }
    }
}

/// Any error, on its way to whoever ran this program.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
