//! Follows the end-to-end tests by what they print, over as many labs as that takes.

use std::io::{self, Write};
use std::time::Instant;

use super::e2e::Report;
use super::total::{Total, test_and_outcome, test_that_runs};
use crate::containerd::Version;

/// How often labs may break in one run before it is given up.
const BREAKS: u32 = 3;

/// Standard output of a run: shown with the version before each line, counted and timed.
pub(super) struct Watch {
    report: Report,
    /// A line that has not ended yet.
    line: Vec<u8>,
    /// When the previous test had ended.
    since: Instant,
    /// Outcomes that no program has summed up yet.
    outcomes: Vec<String>,
    /// The test that a lab broke in, until it has an outcome.
    suspect: Option<String>,
    /// Failed because labs broke in it, without an outcome.
    given_up: Vec<String>,
}

impl Watch {
    pub(super) fn new(version: Version) -> Self {
        let report = Report {
            version,
            total: Total::default(),
            release: None,
            left_out: 0,
            durations: Vec::new(),
            broken: 0,
        };
        Self {
            report,
            line: Vec::new(),
            since: Instant::now(),
            outcomes: Vec::new(),
            suspect: None,
            given_up: Vec::new(),
        }
    }

    /// The tests that need not run again.
    pub(super) fn settled(&self) -> impl Iterator<Item = &str> {
        let ended = self.report.durations.iter().map(|(name, _)| name);
        ended.chain(&self.given_up).map(String::as_str)
    }

    /// Whether another lab is to run again what failed in this one, which is done once.
    pub(super) fn tries_again(&mut self) -> bool {
        let summed_up = self.outcomes.is_empty();
        if !summed_up || !self.given_up.is_empty() {
            return false;
        }
        let again = self.report.total.try_again();
        if !again.is_empty() {
            let version = self.report.version.name();
            eprintln!("    {version} failed, and runs again: {}", again.join(", "));
        }
        self.report
            .durations
            .retain(|(name, _)| !again.contains(name));
        !again.is_empty()
    }

    /// The report, once there is no more to come.
    pub(super) fn report(mut self) -> Report {
        self.report.total.settle();
        self.report
    }

    /// The report, once the program has ended with this status.
    pub(super) fn ended(mut self, status: u8) -> Report {
        if status != 0 && self.report.total.failed == 0 {
            // It ended before it could count: that is a failure too.
            let last = self.report.durations.last().map(|(name, _)| name.as_str());
            let last = last.unwrap_or("its start");
            let said = format!("ended with status {status} after {last}");
            self.report.total.fail("e2e", said);
        }
        self.report()
    }

    /// Counts what had ended before the lab broke; whether another lab is to go on. A test that two
    /// labs broke in has failed.
    pub(super) fn broke(&mut self, error: &anyhow::Error) -> bool {
        let version = self.report.version.name();
        let line = std::mem::take(&mut self.line);
        let suspect = test_that_runs(&String::from_utf8_lossy(&line)).map(str::to_owned);
        let place = suspect.as_deref().unwrap_or("no test");
        eprintln!("    {version} a lab broke in {place}: {error:#}");
        self.report.broken += 1;
        for outcome in std::mem::take(&mut self.outcomes) {
            self.report.total.count(&outcome);
        }
        if suspect.is_some() && suspect == self.suspect {
            self.report
                .total
                .fail(place, format!("broke two labs: {error:#}"));
            self.given_up.extend(self.suspect.take());
        } else {
            self.suspect = suspect;
        }
        let goes_on = self.report.broken < BREAKS;
        if !goes_on {
            let said = format!("gave up, as labs broke {BREAKS} times");
            self.report.total.fail("e2e", said);
        }
        goes_on
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
            self.outcomes.push(outcome.to_owned());
            report.durations.push((name.to_owned(), took));
            return;
        }
        if line.starts_with("running ") {
            self.since = Instant::now();
        } else if line.starts_with("test result: ") {
            self.outcomes.clear();
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

    fn watch(said: &str) -> Watch {
        let mut watch = Watch::new(Version::Stable);
        watch.write_all(said.as_bytes()).unwrap();
        watch
    }

    #[test]
    fn a_run_is_counted_and_timed_by_what_it_prints() {
        let mut watch = watch(
            "containerd 1.7.24~ds1\nleft out: 12\n\nrunning 2 tests\n\
             test a::b      ... ok\ntest a::c ... FAI",
        );
        watch
            .write_all(b"LED\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n")
            .unwrap();
        assert!(watch.settled().eq(["a::b", "a::c"]));
        let report = watch.ended(101);
        assert_eq!((report.total.passed, report.total.failed), (1, 1));
        assert_eq!(
            Report::describe(&[report]),
            "; containerd 1.7.24, 12 tests ran on one alone"
        );
    }

    #[test]
    fn a_run_that_ends_uncounted_has_failed() {
        let report = watch("running 2 tests\ntest a::b ... ok\n").ended(124);
        assert_eq!(report.total.failed, 1);
    }

    #[test]
    fn another_lab_goes_on_where_one_broke() {
        let error = anyhow::anyhow!("the lab ended");
        let mut watch = watch(
            "test a::a ... ok\ntest a::b ... FAILED\ntest a::c ... ignored (why)\ntest a::d   ... ",
        );
        assert!(watch.broke(&error));
        assert!(watch.settled().eq(["a::a", "a::b", "a::c"]));
        watch
            .write_all(b"test a::d ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n")
            .unwrap();
        let report = watch.ended(0);
        assert_eq!(report.total.to_string(), "2 passed, 1 failed, 1 skipped");
        assert_eq!(report.total.failures(), "failed: a::b\n");
        let told = Report::describe(&[report]);
        assert!(told.ends_with(", labs that broke: 1"), "{told}");
    }

    #[test]
    fn what_failed_runs_again_in_another_lab() {
        let mut watch = watch(
            "test a::b ... ok\ntest a::c ... FAILED\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored\n",
        );
        assert!(watch.tries_again());
        assert!(watch.settled().eq(["a::b"]));
        watch
            .write_all(b"test a::c ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n")
            .unwrap();
        assert!(!watch.tries_again());
        let total = watch.ended(0).total;
        assert_eq!((total.passed, total.failed), (2, 0));
        assert!(total.failures().starts_with("failed once: a::c\n"));
    }

    #[test]
    fn what_ended_uncounted_does_not_run_again() {
        assert!(!watch("test a::b ... FAILED\ntest a::c ... ").tries_again());
    }

    #[test]
    fn a_test_that_breaks_two_labs_has_failed() {
        let error = anyhow::anyhow!("the lab ended");
        let mut watch = watch("test a::b ... ");
        assert!(watch.broke(&error));
        assert!(watch.settled().eq([""; 0]));
        watch.write_all(b"test a::b ... ").unwrap();
        assert!(watch.broke(&error));
        assert!(watch.settled().eq(["a::b"]));
        watch.write_all(b"test a::c ... ").unwrap();
        assert!(!watch.broke(&error));
        assert_eq!(watch.report.total.failed, 2);
    }
}
