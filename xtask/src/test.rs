//! `xtask test`: format, lints, unit tests, then end-to-end tests where microVMs run.

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::containerd::Version;
use crate::host::Place;
use crate::programs::{self, Launch};
use crate::step::{call, step};
use crate::{build, deny, host, kernel, lab, paths};

/// The whole end-to-end run, in the lab on two slow processors.
const E2E_LIMIT: Duration = Duration::from_secs(25 * 60);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only end-to-end tests whose name contains this
    #[arg(long, env = "E2E")]
    e2e: Option<String>,
    /// Everything but the end-to-end tests; what `make check` does
    #[arg(long)]
    quick: bool,
}

/// What libtest counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Total {
    passed: u32,
    failed: u32,
    skipped: u32,
}

pub(crate) fn run(args: &Args) -> Result<u8> {
    let mut total = Total::default();
    let mut good = true;
    let filter = args.e2e.as_deref().filter(|name| !name.is_empty());
    if filter.is_none() {
        good &= check(&mut total)?;
    }
    if !args.quick {
        good &= end_to_end(filter, &mut total)?;
    }
    io::stderr().flush().context("cannot flush")?;
    let Total {
        passed,
        failed,
        skipped,
    } = total;
    println!("{passed} passed, {failed} failed, {skipped} skipped");
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
    // Without the advisories: a test's result must not change with the day.
    good &= reported(deny::check(true));
    let unit = ["test", "--workspace", "--no-fail-fast"];
    good &= step("unit tests", || counted(cargo().args(unit), total))?;
    Ok(good)
}

fn end_to_end(filter: Option<&str>, total: &mut Total) -> Result<bool> {
    let kernel = kernel::ensure()?;
    build::build(&kernel)?;
    let place = host::place();
    host::announce(&place);
    // One at a time: a lab has two slow processors, and tests compare what is left before and after.
    let mut args = vec!["--test-threads=1".to_owned()];
    if matches!(place, Place::Lab(_)) {
        // The lab's own containerd holds the images already.
        args.push(format!("--containerd-address={}", lab::CONTAINERD));
    }
    args.extend(filter.map(str::to_owned));
    let out = paths::products().join("e2e");
    paths::remove_dir(&out)?;
    let launch = Launch {
        program: "e2e",
        containerd: Version::Newest,
        args: &args,
        timeout: Some(E2E_LIMIT),
        out: Some(out),
        icount: false,
    };
    let mut tee = Tee::default();
    let status = step("end-to-end tests", || {
        programs::launch(&place, launch, &mut tee)
    })?;
    let counted = tee.total();
    total.add(counted);
    if status != 0 && counted.failed == 0 {
        // It ended before it could count: that is a failure too.
        total.failed += 1;
    }
    Ok(status == 0)
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

impl Total {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn of_line(line: &str) -> Option<Self> {
        let counts = line
            .trim()
            .strip_prefix("test result: ")?
            .split_once(". ")?
            .1;
        let count = |word: &str| {
            counts
                .split("; ")
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            skipped: count("ignored").unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Total;

    #[test]
    fn reads_the_counts_of_libtest() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s";
        assert_eq!(
            Total::of_line(line),
            Some(Total {
                passed: 3,
                failed: 2,
                skipped: 1
            })
        );
        assert_eq!(Total::of_line("running 3 tests"), None);
    }
}
