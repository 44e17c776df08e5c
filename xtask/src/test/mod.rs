//! `xtask test`: format, lints, unit tests, then end-to-end tests where microVMs run.

mod e2e;
mod total;

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use self::e2e::Report;
use self::total::Total;
use crate::containerd::Version;
use crate::step::{call, step};
use crate::{deny, fuzz, paths};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only end-to-end tests whose name contains this
    #[arg(long, env = "E2E")]
    e2e: Option<String>,
    /// End-to-end tests on this containerd only, instead of on both
    #[arg(long, env = "CONTAINERD", value_enum)]
    containerd: Option<Version>,
    /// Also every fuzz target for so many seconds each
    #[arg(long, env = "FUZZ_SECONDS", value_name = "SECONDS")]
    fuzz: Option<u64>,
    /// How many containers `faults::one_after_the_other` runs
    #[arg(long, env = "RUNS")]
    runs: Option<u32>,
    /// Everything but the end-to-end tests; what `make check` does
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(args: &Args) -> Result<u8> {
    let mut total = Total::default();
    let mut good = true;
    let filter = args.e2e.as_deref().filter(|name| !name.is_empty());
    if filter.is_none() {
        good &= check(&mut total)?;
        if let Some(seconds) = args.fuzz {
            let seconds = Duration::from_secs(seconds.max(1));
            let [passed, failed] = step("fuzz", || fuzz::targets(seconds, ""))?;
            total.add(Total {
                passed,
                failed,
                skipped: 0,
            });
        }
    }
    let mut where_run = String::new();
    if !args.quick {
        let versions = args
            .containerd
            .map_or_else(|| Version::ALL.to_vec(), |one| vec![one]);
        let reports = e2e::run(&versions, filter, args.runs)?;
        for report in &reports {
            total.add(report.total);
            good &= report.good;
        }
        where_run = Report::describe(&reports);
    }
    io::stderr().flush().context("cannot flush")?;
    let Total {
        passed,
        failed,
        skipped,
    } = total;
    println!("{passed} passed, {failed} failed, {skipped} skipped{where_run}");
    Ok(u8::from(!good || failed > 0))
}

/// Format, lints and unit tests; goes on after a failure, so that one run tells all.
fn check(total: &mut Total) -> Result<bool> {
    // The last two are what unit tests make images with.
    crate::apt::ensure(&[
        "gcc",
        "libseccomp-dev",
        "pkg-config",
        "e2fsprogs",
        "erofs-utils",
    ])?;
    let mut good = passes("format", cargo().args(["fmt", "--all", "--check"]));
    let lints = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    good &= passes("lints", cargo().args(lints));
    let docs = ["doc", "-p", "supermachine-vmm", "--no-deps"];
    good &= passes(
        "documentation",
        cargo().args(docs).env("RUSTDOCFLAGS", "-Dwarnings"),
    );
    // Without the advisories: a test's result must not change with the day.
    good &= reported(deny::check(true));
    let unit = ["test", "--workspace", "--no-fail-fast"];
    good &= step("unit tests", || counted(cargo().args(unit), total))?;
    Ok(good)
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root());
    command
}

fn passes(name: &str, command: &mut Command) -> bool {
    reported(step(name, || call(command)))
}

fn reported(result: Result<()>) -> bool {
    result
        .map_err(|error| eprintln!("xtask: {error:#}"))
        .is_ok()
}

/// Runs tests, showing their output and adding up what they report.
fn counted(command: &mut Command, total: &mut Total) -> Result<bool> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut tee = Tee::default();
    if let Some(mut pipe) = child.stdout.take() {
        io::copy(&mut pipe, &mut tee).context("cannot read cargo's output")?;
    }
    let status = child.wait().context("cannot wait for cargo")?;
    let counted = tee.total();
    total.add(counted);
    if !status.success() && counted.failed == 0 {
        total.failed += 1;
    }
    Ok(status.success())
}

/// Standard output, remembered to count results from.
#[derive(Debug, Default)]
struct Tee {
    said: Vec<u8>,
}

impl Tee {
    fn total(&self) -> Total {
        let mut total = Total::default();
        for line in String::from_utf8_lossy(&self.said).lines() {
            total.add(Total::of_line(line).unwrap_or_default());
        }
        total
    }
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.said.extend_from_slice(bytes);
        // Progress goes to standard error: our own output ends with the total alone.
        io::stderr().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
