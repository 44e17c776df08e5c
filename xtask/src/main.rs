//! `cargo xtask`: everything around the product that `cargo build` alone doesn't do.
//!
//! The guest kernel, static builds, initramfs, the lab (a machine with working KVM made by QEMU's
//! emulation), images, tests, demo and benches. `make help` lists the everyday entry points.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its user"
)]

mod apt;
mod arch;
mod bench;
mod build;
mod containerd;
mod cpio;
mod cross;
mod demo;
mod deny;
mod fuzz;
mod host;
mod images;
mod kernel;
mod lab;
mod macos;
mod paths;
mod programs;
mod step;
mod sysroot;
mod test;
#[cfg(test)]
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::arch::Arch;

/// Builds, kernel, lab, tests and benches of supermachine.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Build the lean guest kernel, or fetch Debian's with --stock; nothing to do when cached
    Kernel(kernel::Args),
    /// Build static release binaries and the initramfs into target/supermachine
    Build(build::Args),
    /// Make the busybox and Debian OCI archives the tests and the demo import; Debian's for this
    /// machine's processor alone
    Images {
        /// The processor they are for
        #[arg(long, value_enum, default_value_t)]
        arch: Arch,
    },
    /// Run commands in a machine with working KVM, emulated by QEMU
    Lab(lab::Args),
    /// Unit tests, then end-to-end tests; the last line is the total
    Test(test::Args),
    /// Tests of arm64, cross-built, in the arm64 lab; the last line is the total
    TestArm64(test::arm64::Args),
    /// Containers in microVMs under a real containerd, from nothing
    Demo(demo::Args),
    /// Ours beside runc and QEMU, in one run
    Bench(bench::Args),
    /// Every fuzz target for a while
    Fuzz(fuzz::Args),
    /// Licences, sources and advisories of everything we link
    Deny(deny::Args),
    /// The rules of layering, as CONTRIBUTING.md has them
    Tidy,
    /// The macOS build checked, linted and linked here, from source and without anything of Apple's
    CheckMacos,
    /// Build the standard library for another target, such as aarch64-unknown-linux-gnu
    Sysroot { target: String },
    /// Run cargo for static release binaries of a processor, such as `cross clippy -p supermachine-vmm`
    Cross(cross::Args),
    /// The lab's own side of the channel; started by the lab's init
    #[command(hide = true)]
    LabGuest,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Kernel(args) => kernel::run(&args).map(|()| 0),
        Task::Build(args) => build::run(&args).map(|_| 0),
        Task::Images { arch } => images::ensure(arch).map(|_| 0),
        Task::Lab(args) => lab::run(args),
        Task::Test(args) => test::run(&args),
        Task::TestArm64(args) => test::arm64::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args).map(|()| 0),
        Task::Deny(args) => deny::run(&args).map(|()| 0),
        Task::Tidy => test::tidy().map(|()| 0),
        Task::CheckMacos => macos::check().map(|()| 0),
        Task::Sysroot { target } => sysroot::ensure(&target).map(|dir| {
            println!("{}", dir.display());
            0
        }),
        Task::Cross(args) => cross::run(&args).map(|()| 0),
        Task::LabGuest => lab::guest::run().map(|()| 0),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
