//! The end-to-end tests on every containerd: in labs beside each other, or one after the other
//! where they share a host.

use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::total::Total;
use super::watch::Watch;
use crate::arch::Arch;
use crate::containerd::Version;
use crate::host::{self, Place};
use crate::programs::{self, Launch};
use crate::step::step;
use crate::{build, kernel, lab, paths};

/// One whole run, in the lab on two slow processors: 16 minutes on a quiet machine, 41 on the
/// slowest seen.
const LIMIT: Duration = Duration::from_secs(60 * 60);
/// One container more, in the lab.
const RUN: Duration = Duration::from_secs(30);
/// One test: its own deadlines end it far earlier, unless the lab itself hangs.
const SILENCE: Duration = Duration::from_secs(8 * 60);
/// How many of the slowest tests are named.
const SLOWEST: usize = 10;

/// What a run on one containerd told.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) version: Version,
    pub(super) total: Total,
    /// The containerd's exact version.
    pub(super) release: Option<String>,
    /// Tests left to the other run, as one containerd is enough for them.
    pub(super) left_out: u32,
    pub(super) durations: Vec<(String, Duration)>,
    /// How often a lab broke, and another went on.
    pub(super) broken: u32,
}

impl Report {
    pub(super) fn add_to(self, total: &mut Total) {
        total.add(self.total, Some(self.version.name()));
    }

    /// For the last line of a test run.
    pub(super) fn describe(reports: &[Self]) -> String {
        let mut releases = Vec::new();
        for report in reports {
            let release = report.release.as_deref();
            releases.push(release.unwrap_or_else(|| report.version.name()));
        }
        let mut text = format!("; containerd {}", releases.join(" and "));
        let once: u32 = reports.iter().map(|report| report.left_out).sum();
        if once > 0 {
            text.push_str(&format!(", {once} tests ran on one alone"));
        }
        let broken: u32 = reports.iter().map(|report| report.broken).sum();
        if broken > 0 {
            text.push_str(&format!(", labs that broke: {broken}"));
        }
        text
    }
}

/// Runs those whose name contains `filter`, on each of `versions`; `runs` is what is repeated.
pub(super) fn run(
    versions: &[Version],
    filter: Option<&str>,
    runs: Option<u32>,
) -> Result<Vec<Report>> {
    build::build(&kernel::ensure(Arch::HOST)?)?;
    let place = host::place();
    let here = (Arch::HOST, lab::Gic::default());
    host::announce(&place);
    let reports: Vec<Report> = step("end-to-end tests", || match place {
        Place::Native => versions
            .iter()
            .map(|version| on_one(&place, here, *version, filter, runs))
            .collect(),
        Place::Lab(_) => {
            lab::prepare(Arch::HOST)?;
            thread::scope(|scope| {
                let runs: Vec<_> = versions
                    .iter()
                    .map(|version| scope.spawn(|| on_one(&place, here, *version, filter, runs)))
                    .collect();
                runs.into_iter()
                    .map(|run| run.join().map_err(|_| anyhow!("a run panicked"))?)
                    .collect()
            })
        }
    })?;
    name_the_slowest(&reports);
    Ok(reports)
}

/// Runs them in the lab of another processor, for which everything is built and prepared.
pub(super) fn in_lab(arch: Arch, gic: lab::Gic, filter: &str) -> Result<Report> {
    let place = Place::Lab(String::new());
    on_one(&place, (arch, gic), Version::Newest, Some(filter), None)
}

fn on_one(
    place: &Place,
    (arch, gic): (Arch, lab::Gic),
    version: Version,
    filter: Option<&str>,
    runs: Option<u32>,
) -> Result<Report> {
    // One at a time: a lab has two slow processors, and tests compare what is left before and after.
    let mut args = vec!["--test-threads=1".to_owned()];
    if version != Version::Newest {
        args.push("--only-containerd".to_owned());
    }
    if matches!(place, Place::Lab(_)) {
        // The lab's own containerd holds the images already.
        args.push(format!("--containerd-address={}", lab::CONTAINERD));
    }
    args.extend(runs.map(|runs| format!("--runs={runs}")));
    args.extend(filter.map(str::to_owned));
    let out = paths::products(arch).join("e2e").join(version.name());
    paths::remove_dir(&out)?;
    let mut watch = Watch::new(version);
    loop {
        let without = watch.settled().flat_map(|name| ["--without", name]);
        let args: Vec<_> = args
            .iter()
            .cloned()
            .chain(without.map(str::to_owned))
            .collect();
        let launch = Launch {
            arch,
            program: "e2e",
            containerd: version,
            args: &args,
            timeout: Some(LIMIT + RUN * runs.unwrap_or(0)),
            silence: Some(SILENCE + RUN * runs.unwrap_or(0)),
            out: Some(out.clone()),
            pace: lab::Pace::Steady,
            gic,
        };
        match programs::launch(place, launch, &mut watch) {
            // An emulated machine is slow at any moment it likes: what failed in it fails again if
            // it has a reason.
            Ok(_) if matches!(place, Place::Lab(_)) && watch.tries_again() => {}
            Ok(status) => return Ok(watch.ended(status)),
            // Another lab goes on, beginning with the test that ran in this one.
            Err(error) if error.is::<lab::Broken>() => {
                if !watch.broke(&error) {
                    return Ok(watch.report());
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn name_the_slowest(reports: &[Report]) {
    let mut all: Vec<_> = reports
        .iter()
        .flat_map(|report| {
            let version = report.version.name();
            report.durations.iter().map(move |test| (version, test))
        })
        .collect();
    all.sort_by_key(|(_, (_, took))| std::cmp::Reverse(*took));
    for (version, (name, took)) in all.into_iter().take(SLOWEST) {
        eprintln!("    {:6.1} s  {name} ({version})", took.as_secs_f64());
    }
}
