//! What test programs counted, and what failed, to be said once more where a run ends.

/// How many failures of one run may be chance, so that those tests run again.
const UNSTEADY: u32 = 3;
/// Lines kept of what a failure said.
const LINES: usize = 6;
/// Characters kept of each of them.
const WIDTH: usize = 240;

/// Tests by how they ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Total {
    pub(super) passed: u32,
    pub(super) failed: u32,
    pub(super) skipped: u32,
    failures: Vec<Failure>,
    /// What failed and is to run once more.
    tried_again: Vec<Failure>,
    /// What failed and passed when it ran once more.
    unsteady: Vec<Failure>,
    /// The test whose words the next lines are.
    speaker: Option<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Failure {
    name: String,
    said: Vec<String>,
}

impl Total {
    /// Counts what failed without being a test that says so, such as a step.
    pub(super) fn fail(&mut self, name: &str, said: impl std::fmt::Display) {
        self.failed += 1;
        self.failures.push(Failure {
            name: name.to_owned(),
            said: said.to_string().lines().take(LINES).map(cut).collect(),
        });
    }

    /// Adds what another run told; `place` is put behind the names of what failed there.
    pub(super) fn add(&mut self, other: Self, place: Option<&str>) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        let there = |failure: Failure| Failure {
            name: match place {
                Some(place) => format!("{} ({place})", failure.name),
                None => failure.name,
            },
            said: failure.said,
        };
        self.failures.extend(other.failures.into_iter().map(there));
        self.unsteady.extend(other.unsteady.into_iter().map(there));
    }

    /// Takes back, once, that these failed, so that they can run again: none if they are too many.
    pub(super) fn try_again(&mut self) -> Vec<String> {
        let first = self.tried_again.is_empty() && self.unsteady.is_empty();
        if !first || self.failed > UNSTEADY || self.failed as usize != self.failures.len() {
            return Vec::new();
        }
        self.failed = 0;
        self.tried_again = std::mem::take(&mut self.failures);
        let names = self.tried_again.iter();
        names.map(|failure| failure.name.clone()).collect()
    }

    /// What was to run again and did not come to an end has failed.
    pub(super) fn settle(&mut self) {
        for failure in std::mem::take(&mut self.tried_again) {
            self.failed += 1;
            self.failures.push(failure);
        }
    }

    /// Counts a test whose program could not sum up any more.
    pub(super) fn count(&mut self, outcome: &str) {
        match outcome.split(' ').next() {
            Some("ok") => self.passed += 1,
            Some("ignored") => self.skipped += 1,
            _ => self.failed += 1,
        }
    }

    /// Counts by one line of a test program's output.
    pub(super) fn take_line(&mut self, line: &str) {
        if let Some((passed, failed, skipped)) = counts(line) {
            self.passed += passed;
            self.failed += failed;
            self.skipped += skipped;
            self.speaker = None;
        } else if let Some((name, outcome)) = test_and_outcome(line) {
            // Some tell their time after it.
            if outcome.split(' ').next() == Some("ok") {
                let passed = self
                    .tried_again
                    .extract_if(.., |failure| failure.name == name);
                self.unsteady.extend(passed);
            } else if outcome.starts_with("FAILED") {
                self.tried_again.retain(|failure| failure.name != name);
                self.failures.push(Failure {
                    name: name.to_owned(),
                    said: Vec::new(),
                });
            }
        } else if let Some(heading) = line.strip_prefix("---- ") {
            self.speaker = heading
                .strip_suffix(" ----")
                .map(|name| name.strip_suffix(" stdout").unwrap_or(name).to_owned());
        } else if line == "failures:" {
            self.speaker = None;
        } else if let Some(speaker) = &self.speaker
            && !line.trim().is_empty()
            && let Some(failure) = self
                .failures
                .iter_mut()
                .rfind(|failure| failure.name == *speaker)
            && failure.said.len() < LINES
        {
            failure.said.push(cut(line));
        }
    }

    /// What failed, at first or in the end, and the first it said, for the end of a long run.
    pub(super) fn failures(&self) -> String {
        let mut text = String::new();
        let unsteady = self.unsteady.iter().map(|failure| ("failed once", failure));
        let failed = self.failures.iter().map(|failure| ("failed", failure));
        for (how, failure) in unsteady.chain(failed) {
            text.push_str(&format!("{how}: {}\n", failure.name));
            for line in &failure.said {
                text.push_str(&format!("    {line}\n"));
            }
        }
        text
    }
}

impl std::fmt::Display for Total {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
            ..
        } = self;
        write!(to, "{passed} passed, {failed} failed, {skipped} skipped")?;
        match self.unsteady.len() {
            0 => Ok(()),
            some => write!(to, ", {some} passed only when run again"),
        }
    }
}

/// The parts of `test NAME ... OUTCOME`.
pub(super) fn test_and_outcome(line: &str) -> Option<(&str, &str)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    Some((name.trim(), outcome.trim()))
}

/// The name in `test NAME ... `, what is printed of a test that runs.
pub(super) fn test_that_runs(line: &str) -> Option<&str> {
    let (name, outcome) = test_and_outcome(line)?;
    outcome.is_empty().then_some(name)
}

/// Passed, failed and ignored of `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn counts(line: &str) -> Option<(u32, u32, u32)> {
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
    Some((
        count("passed")?,
        count("failed")?,
        count("ignored").unwrap_or(0),
    ))
}

fn cut(line: &str) -> String {
    line.chars().take(WIDTH).collect()
}

#[cfg(test)]
mod tests {
    use super::Total;

    fn told(said: &str) -> Total {
        let mut total = Total::default();
        said.lines().for_each(|line| total.take_line(line));
        total
    }

    #[test]
    fn reads_the_counts_of_libtest() {
        let total = told(
            "running 3 tests\n\
            test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s",
        );
        assert_eq!((total.passed, total.failed, total.skipped), (3, 2, 1));
    }

    #[test]
    fn what_passes_when_it_runs_again_is_named() {
        let failed = "test a::b ... FAILED\ntest a::c ... FAILED\ntest a::d ... ok\n\
             ---- a::b ----\nwhy\ntest result: FAILED. 1 passed; 2 failed; 0 ignored";
        let mut total = told(failed);
        assert_eq!(total.try_again(), ["a::b", "a::c"]);
        let again = "test a::b ... ok (0.20 s)\ntest a::c ... FAILED\n\
             ---- a::c ----\nthis\ntest result: FAILED. 1 passed; 1 failed; 0 ignored";
        again.lines().for_each(|line| total.take_line(line));
        assert!(total.try_again().is_empty());
        total.settle();
        let mut whole = Total::default();
        whole.add(total, Some("1.7"));
        assert_eq!(
            whole.to_string(),
            "2 passed, 1 failed, 0 skipped, 1 passed only when run again"
        );
        assert_eq!(
            whole.failures(),
            "failed once: a::b (1.7)\n    why\nfailed: a::c (1.7)\n    this\n"
        );
    }

    #[test]
    fn more_than_a_few_do_not_run_again() {
        let mut total = Total::default();
        for name in ["a", "b", "c", "d"] {
            total.fail(name, "why");
        }
        assert!(total.try_again().is_empty());
        assert_eq!(total.failed, 4);
    }

    #[test]
    fn what_does_not_end_when_it_runs_again_has_failed() {
        let mut total = Total::default();
        total.fail("a", "why");
        assert_eq!(total.try_again(), ["a"]);
        assert_eq!(total.failed, 0);
        total.settle();
        assert_eq!(total.failures(), "failed: a\n    why\n");
        assert_eq!(total.failed, 1);
    }

    #[test]
    fn what_failed_is_said_again() {
        let mut whole = Total::default();
        whole.add(
            told(
                "test a::b ... FAILED\ntest a::c ... ok\n\nfailures:\n\n---- a::b stdout ----\n\n\
                 thread 'a::b' panicked at a.rs:1:2:\nleft: 1\n\n\nfailures:\n    a::b\n\n\
                 test result: FAILED. 1 passed; 1 failed; 0 ignored",
            ),
            Some("2.x"),
        );
        whole.fail("lints", "clippy: exit status: 101");
        assert_eq!(whole.to_string(), "1 passed, 2 failed, 0 skipped");
        assert_eq!(
            whole.failures(),
            "failed: a::b (2.x)\n    thread 'a::b' panicked at a.rs:1:2:\n    left: 1\n\
             failed: lints\n    clippy: exit status: 101\n"
        );
    }
}
