//! End-to-end tests: containers under a real containerd, as a user runs them, and a shim driven as
//! containerd drives it.
//!
//!     e2e [--runtime NAME] [--containerd-address SOCKET] [--images DIR] [FILTER] [--list] …
//!
//! Without an address it starts a containerd of its own. `containerd`, `ctr` and the shim are
//! looked for on `PATH`; `SUPERMACHINE_IMAGES` names the folder with busybox.tar and debian.tar,
//! `SUPERMACHINE_KERNELS` the one with the kernels that [`kernels`] boots, `SUPERMACHINE_CONFIG` the
//! shim's configuration. With `--runtime io.containerd.runc.v2` the same
//! tests run on runc, which proves them; those that only make sense in a VM are skipped and say so.
//! Everything after that is as with any Rust test program. One test at a time, because tests
//! compare what is left on the host.

#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test program")]

mod bad;
mod balloon;
mod changes;
mod clones;
mod confinement;
mod docker;
mod driven;
mod examples;
mod exec;
mod faults;
mod initramfs;
mod input;
mod kernels;
mod leftovers;
mod limits;
mod machine;
mod output;
mod process;
mod refused;
mod slots;
mod snapshotters;
mod spec;
mod stats;
mod support;
mod terminal;
mod versions;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use libtest_mimic::{Arguments, Trial};
use supermachine_tests::RUNTIME;

use support::World;

/// Groups that one run is enough for: they drive a shim themselves, so that no containerd is
/// involved, or a dockerd, which is on the newest.
const ONCE: &[&str] = &[
    "bad",
    "balloon",
    "clones",
    "confinement",
    "docker",
    "driven",
    "examples",
    "faults",
    "kernels",
    "slots",
];
/// What in such a group is about containerd all the same.
const WITH_CONTAINERD: &str = "faults::containerd_";

#[derive(Debug, Parser)]
#[command(about = "End-to-end tests of supermachine")]
struct Options {
    /// The runtime to test
    #[arg(long, default_value = RUNTIME)]
    runtime: String,
    /// A containerd that runs already; without it, one of our own is started
    #[arg(long)]
    containerd_address: Option<PathBuf>,
    /// The folder with busybox.tar and debian.tar, OCI archives
    #[arg(long, env = "SUPERMACHINE_IMAGES")]
    images: PathBuf,
    /// The snapshotter; containerd's default without it
    #[arg(long)]
    snapshotter: Option<String>,
    /// The most that one step may take, in seconds
    #[arg(long, default_value_t = 120)]
    deadline: u64,
    /// How many containers `faults::one_after_the_other` runs
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Leave out the tests that one containerd is enough for: a run on another has them
    #[arg(long)]
    only_containerd: bool,
    /// Leave out this test, by its whole name; may be given again
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    #[command(flatten)]
    tests: Arguments,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<ExitCode> {
    let mut arguments = options.tests;
    arguments.test_threads = Some(1);
    let suites = [
        output::tests,
        input::tests,
        terminal::tests,
        exec::tests,
        process::tests,
        limits::tests,
        stats::tests,
        changes::tests,
        leftovers::tests,
        refused::tests,
        spec::tests,
        driven::tests,
        kernels::tests,
        balloon::tests,
        slots::tests,
        clones::tests,
        examples::tests,
        confinement::tests,
        bad::tests,
        versions::tests,
        snapshotters::tests,
        docker::tests,
        faults::tests,
    ];
    if arguments.list {
        let listed = suites
            .iter()
            .flat_map(|suite| suite(&World::nowhere()))
            .collect();
        return Ok(libtest_mimic::run(&arguments, listed).exit_code());
    }
    let world = World::new(
        options.runtime,
        options.containerd_address,
        options.images,
        options.snapshotter,
        Duration::from_secs(options.deadline),
        options.runs,
    )
    .context("prepare the tests")?;
    println!("containerd {}", world.release);
    let mut tests: Vec<_> = suites.iter().flat_map(|suite| suite(&world)).collect();
    if options.only_containerd {
        let all = tests.len();
        tests.retain(on_every_containerd);
        println!("left out: {}", all - tests.len());
    }
    tests.retain(|test| !options.without.iter().any(|name| name == test.name()));
    let conclusion = libtest_mimic::run(&arguments, tests);
    if conclusion.has_failed()
        && let Some(containerd) = &world.host.containerd
    {
        eprintln!("log of containerd and its shims:\n{}", containerd.log());
    }
    // Not by exit(): the containerd is stopped when it is dropped.
    Ok(conclusion.exit_code())
}

fn on_every_containerd(test: &Trial) -> bool {
    let group = test.name().split("::").next().unwrap_or_default();
    !ONCE.contains(&group) || test.name().starts_with(WITH_CONTAINERD)
}
