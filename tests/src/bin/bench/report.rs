//! The table that comes out.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use supermachine_tests::step::say;

/// A Markdown table of figures, ours beside others', and what is missing in it.
#[derive(Debug)]
pub(crate) struct Report {
    columns: &'static [&'static str],
    rows: Vec<Vec<String>>,
    missing: Vec<String>,
}

impl Report {
    /// An empty table: a column for what is measured, and these.
    pub(crate) fn new(columns: &'static [&'static str]) -> Self {
        Self {
            columns,
            rows: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// A row of two figures.
    pub(crate) fn row(&mut self, what: &str, ours: impl Into<String>, other: impl Into<String>) {
        self.rows
            .push(vec![what.to_owned(), ours.into(), other.into()]);
    }

    /// A row of as many figures as there are columns.
    pub(crate) fn wide(&mut self, what: &str, figures: impl IntoIterator<Item = String>) {
        self.rows
            .push(std::iter::once(what.to_owned()).chain(figures).collect());
    }

    /// Takes a figure, or notes why it is missing.
    pub(crate) fn take<T>(&mut self, what: &str, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.missing.push(format!("{what}: {error:#}"));
                None
            }
        }
    }

    /// Prints it, and keeps it where results go.
    pub(crate) fn finish(&self, title: &str, file: &str) -> Result<()> {
        let names = self.columns.join(" | ");
        let rule = "---|".repeat(self.columns.len());
        let mut text = format!("## {title}\n\n| | {names} |\n|---|{rule}\n");
        for cells in &self.rows {
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        for missing in &self.missing {
            let _ = write!(text, "\nMissing: {}\n", missing.replace('\n', " "));
        }
        say(&text);
        if let Some(out) = std::env::var_os("SUPERMACHINE_OUT") {
            std::fs::write(Path::new(&out).join(file), &text).context("cannot keep the report")?;
        }
        anyhow::ensure!(
            self.missing.is_empty(),
            "{} figures are missing",
            self.missing.len()
        );
        Ok(())
    }
}

/// `median (least–most, n)` in milliseconds.
pub(crate) fn milliseconds(nanoseconds: &[u64]) -> String {
    let mut sorted = nanoseconds.to_vec();
    sorted.sort_unstable();
    let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
        return "—".to_owned();
    };
    let upper = sorted.get(sorted.len() / 2).unwrap_or(most);
    let lower = sorted.get((sorted.len() - 1) / 2).unwrap_or(least);
    let median = (upper + lower) / 2;
    let text = |value: u64| format!("{:.1}", value as f64 / 1e6);
    format!(
        "{} ms ({}–{}, n={})",
        text(median),
        text(*least),
        text(*most),
        sorted.len()
    )
}

/// As [`milliseconds`].
pub(crate) fn durations(times: &[Duration]) -> String {
    let nanoseconds: Vec<u64> = times
        .iter()
        .map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
        .collect();
    milliseconds(&nanoseconds)
}
