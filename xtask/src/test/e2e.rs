//! The end-to-end tests on every containerd: in labs beside each other, or one after the other
//! where they share a host.

use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::total::{Total, test_and_outcome};
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
const SILENCE: Duration = Duration::from_secs(15 * 60);
/// How many of the slowest tests are named.
const SLOWEST: usize = 10;

/// What a run on one containerd told.
#[derive(Debug)]
pub(super) struct Report {
    version: Version,
    pub(super) total: Total,
    /// The containerd's exact version.
    release: Option<String>,
    /// Tests left to the other run, as one containerd is enough for them.
    left_out: u32,
    durations: Vec<(String, Duration)>,
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
    host::announce(&place);
    let reports: Vec<Report> = step("end-to-end tests", || match place {
        Place::Native => versions
            .iter()
            .map(|version| on_one(&place, Arch::HOST, *version, filter, runs))
            .collect(),
        Place::Lab(_) => {
            lab::prepare(Arch::HOST)?;
            thread::scope(|scope| {
                let runs: Vec<_> = versions
                    .iter()
                    .map(|version| {
                        scope.spawn(|| on_one(&place, Arch::HOST, *version, filter, runs))
                    })
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
pub(super) fn in_lab(arch: Arch, filter: &str) -> Result<Report> {
    let place = Place::Lab(String::new());
    on_one(&place, arch, Version::Newest, Some(filter), None)
}

fn on_one(
    place: &Place,
    arch: Arch,
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
    let launch = Launch {
        arch,
        program: "e2e",
        containerd: version,
        args: &args,
        timeout: Some(LIMIT + RUN * runs.unwrap_or(0)),
        silence: Some(SILENCE + RUN * runs.unwrap_or(0)),
        out: Some(out),
        icount: false,
    };
    let mut watch = Watch::new(version);
    let status = programs::launch(place, launch, &mut watch)?;
    let mut report = watch.report;
    if status != 0 && report.total.failed == 0 {
        // It ended before it could count: that is a failure too.
        let last = report.durations.last().map(|(name, _)| name.as_str());
        report.total.fail(
            "e2e",
            format!(
                "ended with status {status} after {}",
                last.unwrap_or("its start")
            ),
        );
    }
    Ok(report)
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

/// Standard output of a run: shown with the version before each line, counted and timed.
struct Watch {
    report: Report,
    /// A line that has not ended yet.
    line: Vec<u8>,
    /// When the previous test had ended.
    since: Instant,
}

impl Watch {
    fn new(version: Version) -> Self {
        let report = Report {
            version,
            total: Total::default(),
            release: None,
            left_out: 0,
            durations: Vec::new(),
        };
        Self {
            report,
            line: Vec::new(),
            since: Instant::now(),
        }
    }

    fn take_line(&mut self, line: &str) {
        let version = self.report.version.name();
        let report = &mut self.report;
        report.total.take_line(line);
        if let Some((name, outcome)) = test_and_outcome(line) {
            let took = self.since.elapsed();
            self.since = Instant::now();
            eprintln!(
                "    {version} {:6.1} s  {name} ... {outcome}",
                took.as_secs_f64()
            );
            report.durations.push((name.to_owned(), took));
            return;
        }
        if line.starts_with("running ") {
            self.since = Instant::now();
        } else if let Some(release) = line.strip_prefix("containerd ") {
            // Without the packager's suffix: 1.7.24~ds1, 2.1.9+unknown.
            let release = release.split(['~', '+']).next();
            report.release = release.map(|release| release.trim().to_owned());
        } else if let Some(count) = line.strip_prefix("left out: ") {
            report.left_out = count.trim().parse().unwrap_or(0);
        }
        eprintln!("    {version} {line}");
    }
}

impl Write for Watch {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.take_line(&String::from_utf8_lossy(&line));
            } else {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_counted_and_timed_by_what_it_prints() {
        let mut watch = Watch::new(Version::Stable);
        let said = "containerd 1.7.24~ds1\nleft out: 12\n\nrunning 2 tests\n\
                    test a::b      ... ok\ntest a::c ... FAI";
        watch.write_all(said.as_bytes()).unwrap();
        watch
            .write_all(b"LED\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n")
            .unwrap();
        let report = watch.report;
        let names: Vec<_> = report
            .durations
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(names, ["a::b", "a::c"]);
        assert_eq!((report.total.passed, report.total.failed), (1, 1));
        assert_eq!(
            Report::describe(&[report]),
            "; containerd 1.7.24, 12 tests ran on one alone"
        );
    }
}
