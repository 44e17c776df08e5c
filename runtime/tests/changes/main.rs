//! The process that writes a container's changes into a snapshot, for real: this program, executed
//! again, confined, and given streams as a guest would send them, good ones and others.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

#[cfg(target_os = "linux")]
mod denied;
mod hostile;
mod support;
mod written;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

fn main() -> ExitCode {
    if let Some(code) = supermachine_runtime::child() {
        return code;
    }
    #[cfg(target_os = "linux")]
    if let Some(code) = denied::child() {
        return code;
    }
    let arguments = Arguments::from_args();
    let tests = [
        written::TESTS,
        hostile::TESTS,
        #[cfg(target_os = "linux")]
        denied::TESTS,
    ];
    let tests = tests.into_iter().flatten();
    let tests: Vec<Trial> = tests
        .map(|(name, run)| {
            Trial::ignorable_test(*name, move || {
                if !rustix::process::geteuid().is_root() {
                    return Ok(Completion::ignored_with("only as root"));
                }
                run();
                Ok(Completion::Completed)
            })
        })
        .collect();
    libtest_mimic::run(&arguments, tests).exit_code()
}
