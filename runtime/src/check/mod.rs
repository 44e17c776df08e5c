//! Can a container start on this host, and if not, why.
//!
//! Each line of the [`Report`] is one thing looked at: what was found, and what to do where that
//! isn't right. Nothing is changed, except that directories of the configuration are made.

mod confinement;
mod containerd;
mod files;
mod host;
mod programs;

use std::fmt;
use std::path::PathBuf;

use crate::config::Resolved;

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Ok,
    /// Containers start, but something is missing or slow.
    Warn,
    /// No container can start.
    Fail,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub name: &'static str,
    pub status: Status,
    pub found: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Line {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let advice = Some(advice.into());
        Self {
            name,
            status: Status::Warn,
            found: found.into(),
            advice,
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let advice = Some(advice.into());
        Self {
            name,
            status: Status::Fail,
            found: found.into(),
            advice,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        write!(f, "{status}  {:<13} {}", self.name, self.found)?;
        match &self.advice {
            Some(advice) => write!(f, "\n{:21}{advice}", ""),
            None => Ok(()),
        }
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub lines: Vec<Line>,
}

impl Report {
    /// Whether a container could start.
    pub fn can_start(&self) -> bool {
        self.lines.iter().all(|line| line.status < Status::Fail)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines
            .iter()
            .try_for_each(|line| writeln!(f, "{line}"))?;
        let failed: Vec<_> = self
            .lines
            .iter()
            .filter(|line| line.status == Status::Fail)
            .map(|line| line.name)
            .collect();
        match failed.as_slice() {
            [] => writeln!(f, "A container can start on this host."),
            failed => writeln!(
                f,
                "No container can start on this host: {}.",
                failed.join(", ")
            ),
        }
    }
}

/// Looks at this host, from a program whose `main` calls [`child`](crate::child) first.
/// `containerd` names the binary to ask; without it, those that run are
/// asked, or the one on the PATH.
pub fn run(config: &Resolved, containerd: Option<PathBuf>) -> Report {
    let mut lines = host::lines(config);
    lines.extend(confinement::lines(config));
    lines.extend(containerd::lines(containerd));
    lines.extend(programs::lines());
    lines.extend(files::lines(config));
    Report { lines }
}

#[cfg(test)]
mod tests;
