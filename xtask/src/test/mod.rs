//! `xtask test`: format, lints, unit tests, the macOS build, end-to-end tests where microVMs run,
//! then fuzzing, and tests of arm64 in its lab.

pub(crate) mod arm64;
mod e2e;
mod total;
mod watch;

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::e2e::Report;
use self::total::Total;
use crate::containerd::Version;
use crate::step::{call, step};
use crate::{deny, fuzz, macos, paths};

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
    /// Leave out fuzzing and the tests of arm64 when all before them took longer, and say so
    #[arg(long, env = "BUDGET", value_name = "MINUTES")]
    budget: Option<u64>,
    /// How many containers `faults::one_after_the_other` runs
    #[arg(long, env = "RUNS")]
    runs: Option<u32>,
    /// Everything but the end-to-end tests; what `make check` does
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(args: &Args) -> Result<u8> {
    let begin = Instant::now();
    let mut total = Total::default();
    let filter = args.e2e.as_deref().filter(|name| !name.is_empty());
    if filter.is_none() {
        check(&mut total)?;
    }
    let mut where_run = String::new();
    if !args.quick {
        let versions = args
            .containerd
            .map_or_else(|| Version::ALL.to_vec(), |one| vec![one]);
        let reports = e2e::run(&versions, filter, args.runs)?;
        where_run = Report::describe(&reports);
        for report in reports {
            report.add_to(&mut total);
        }
    }
    if filter.is_none()
        && let Some(seconds) = args.fuzz
        && in_time(args, begin, "fuzz", &mut total)
    {
        let seconds = Duration::from_secs(seconds.max(1));
        for (name, outcome) in step("fuzz", || fuzz::targets(seconds, ""))? {
            match outcome {
                Ok(()) => total.passed += 1,
                Err(error) => total.fail(&format!("fuzz {name}"), format!("{error:#}")),
            }
        }
    }
    // It has nothing to do with a containerd: a run on one alone is about that.
    let whole = !args.quick && filter.is_none() && args.containerd.is_none();
    if whole && in_time(args, begin, "arm64", &mut total) {
        arm64::counted(&arm64::Args::default(), &mut total);
    }
    Ok(conclude(&total, &where_run))
}

/// Says what failed once more, then the total; the exit status.
fn conclude(total: &Total, more: &str) -> u8 {
    eprint!("{}", total.failures());
    println!("{total}{more}");
    u8::from(total.failed > 0)
}

/// Whether there is time left for what takes long and comes last; if not, that is said and counted.
fn in_time(args: &Args, begin: Instant, name: &str, total: &mut Total) -> bool {
    let Some(budget) = args.budget else {
        return true;
    };
    let left = begin.elapsed() < Duration::from_secs(60 * budget);
    if !left {
        eprintln!(
            "    {name}: skipped: what came before took longer than the {budget} minutes allowed"
        );
        total.skipped += 1;
    }
    left
}

/// Format, lints, unit tests and the macOS build; goes on after a failure, so that one run tells all.
fn check(total: &mut Total) -> Result<()> {
    // The last three are what unit tests make images with, and of.
    crate::apt::ensure(&[
        "gcc",
        "libseccomp-dev",
        "pkg-config",
        "busybox-static",
        "e2fsprogs",
        "erofs-utils",
    ])?;
    passes("format", cargo().args(["fmt", "--all", "--check"]), total);
    let lints = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    passes("lints", cargo().args(lints), total);
    let docs = ["doc", "-p", "supermachine-vmm", "--no-deps"];
    passes(
        "documentation",
        cargo().args(docs).env("RUSTDOCFLAGS", "-Dwarnings"),
        total,
    );
    // Without the advisories: a test's result must not change with the day.
    reported("licences", deny::check(true), total);
    let unit = ["test", "--workspace", "--no-fail-fast"];
    step("unit tests", || counted(cargo().args(unit), total))?;
    reported("macOS", macos::check(), total);
    Ok(())
}

/// The tests that hold the rules of layering, alone.
pub(crate) fn tidy() -> Result<()> {
    call(cargo().args(["test", "-q", "-p", "xtask", "tidy::"]))
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root());
    command
}

fn passes(name: &str, command: &mut Command, total: &mut Total) {
    reported(name, step(name, || call(command)), total);
}

fn reported(name: &str, result: Result<()>, total: &mut Total) {
    if let Err(error) = result {
        eprintln!("xtask: {error:#}");
        total.fail(name, format!("{error:#}"));
    }
}

/// Runs tests, showing their output and adding up what they report.
fn counted(command: &mut Command, total: &mut Total) -> Result<()> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut tee = Tee::default();
    if let Some(mut pipe) = child.stdout.take() {
        io::copy(&mut pipe, &mut tee).context("cannot read cargo's output")?;
    }
    let status = child.wait().context("cannot wait for cargo")?;
    tee.add_to(total, "unit tests", status.success());
    Ok(())
}

/// Standard output, remembered to count results from.
#[derive(Debug, Default)]
struct Tee {
    said: Vec<u8>,
}

impl Tee {
    /// Adds what was counted; what ended badly before it could count is a failure too.
    fn add_to(&self, total: &mut Total, name: &str, good: bool) {
        let before = total.failed;
        for line in String::from_utf8_lossy(&self.said).lines() {
            total.take_line(line);
        }
        if !good && total.failed == before {
            total.fail(name, "ended badly before it had counted a failure");
        }
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

#[cfg(test)]
mod tests {
    use super::{Args, Instant, Total, in_time};

    #[test]
    fn what_is_left_out_is_counted() {
        let mut args = Args {
            e2e: None,
            containerd: None,
            fuzz: None,
            budget: None,
            runs: None,
            quick: false,
        };
        let mut total = Total::default();
        assert!(in_time(&args, Instant::now(), "x", &mut total));
        args.budget = Some(1);
        assert!(in_time(&args, Instant::now(), "x", &mut total));
        assert_eq!(total.skipped, 0);
        args.budget = Some(0);
        assert!(!in_time(&args, Instant::now(), "x", &mut total));
        assert_eq!(total.skipped, 1);
    }
}
