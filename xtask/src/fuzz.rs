//! `xtask fuzz`: every fuzz target for a while.
//!
//! The coverage that libFuzzer is led by comes from flags any compiler takes, so neither a nightly
//! one nor cargo-fuzz is needed. What a target has found worth keeping stays in the cache and is
//! where the next run begins.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths;
use crate::step::{call, step};

/// Coverage as libFuzzer wants it (clang's SanitizerCoverage). No AddressSanitizer: the code that
/// reads what a guest wrote is safe Rust, and what maps memory is tested apart.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// The longest input.
const MAX_LEN: u32 = 4096;
/// The longest that one input may take, in seconds: anything near it is work without bound.
const LONGEST: u32 = 25;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long each target runs
    #[arg(long, env = "SECONDS", default_value_t = 60)]
    seconds: u64,
    /// Only targets whose name contains this
    #[arg(long, default_value = "")]
    target: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let seconds = Duration::from_secs(args.seconds.max(1));
    let outcomes = targets(seconds, &args.target)?;
    let bad = outcomes.iter().filter(|(_, outcome)| outcome.is_err());
    let bad = bad.count();
    println!("{} targets passed, {bad} failed", outcomes.len() - bad);
    if bad > 0 {
        bail!("{bad} fuzz targets failed");
    }
    Ok(())
}

/// Runs targets, as many at once as there are processors; answers with how each ended.
pub(crate) fn targets(each: Duration, filter: &str) -> Result<Vec<(String, Result<()>)>> {
    let built = step("fuzz targets", build)?;
    let names: VecDeque<String> = names()?
        .into_iter()
        .filter(|name| name.contains(filter))
        .collect();
    if names.is_empty() {
        bail!("no fuzz target has a name with {filter:?} in it");
    }
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    let left = Mutex::new(names);
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(name) = left.lock().ok().and_then(|mut left| left.pop_front()) {
                    let outcome = fuzz(&built, &name, each);
                    match &outcome {
                        Ok(executed) => eprintln!("    fuzz {name}: {executed}"),
                        Err(error) => eprintln!("xtask: fuzz {name}: {error:#}"),
                    }
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.push((name, outcome.map(drop)));
                    }
                }
            });
        }
    });
    outcomes
        .into_inner()
        .map_err(|_| anyhow::anyhow!("a thread that ran a fuzz target panicked"))
}

/// The targets there are: a file each.
fn names() -> Result<Vec<String>> {
    let dir = paths::root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry.context("cannot read a folder")?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Builds all targets and answers with the folder they are in.
fn build() -> Result<PathBuf> {
    // libFuzzer itself is C++.
    crate::apt::ensure(&["g++"])?;
    let target = paths::target().join("fuzz");
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(paths::root().join("fuzz"))
        // With a target of its own, build scripts are not instrumented. Not `--locked`: the lock
        // follows the VMM's dependencies.
        .args(["build", "--release", "--target", &triple])
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", COVERAGE);
    call(&mut command)?;
    Ok(target.join(triple).join("release"))
}

/// Runs one target; answers with how much it did.
fn fuzz(built: &Path, name: &str, time: Duration) -> Result<String> {
    let corpus = paths::cache()?.join("fuzz").join(name);
    let artifacts = paths::target().join("fuzz/artifacts").join(name);
    paths::make_dir(&corpus)?;
    paths::make_dir(&artifacts)?;
    let output = Command::new(built.join(name))
        .arg(format!("-max_total_time={}", time.as_secs()))
        .arg(format!("-max_len={MAX_LEN}"))
        .arg(format!("-timeout={LONGEST}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-rss_limit_mb=4096"])
        .arg(&corpus)
        .stdin(Stdio::null())
        .output()
        .context("cannot start it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let lines: Vec<&str> = said.lines().collect();
        let from = lines.len().saturating_sub(40);
        bail!(
            "{}\n{}",
            output.status,
            lines.get(from..).unwrap_or_default().join("\n")
        );
    }
    let stat = |key: &str| {
        let value = said.lines().find_map(|line| line.strip_prefix(key))?;
        Some(value.trim_start_matches([':', ' ']).trim().to_owned())
    };
    let executed = stat("stat::number_of_executed_units").context("it told no number of runs")?;
    if executed == "0" {
        bail!("it ran nothing");
    }
    let rate = stat("stat::average_exec_per_sec").unwrap_or_default();
    Ok(format!("{executed} inputs, {rate} a second"))
}
