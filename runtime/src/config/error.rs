//! Configuration errors, located.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is missing or can't be read.
    #[error("Cannot read configuration file {}", file.display())]
    Unreadable {
        file: PathBuf,
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("{}, line {line}: not valid TOML: {reason}", file.display())]
    Syntax {
        file: PathBuf,
        line: usize,
        reason: String,
    },
    /// A key or section that doesn't exist.
    #[error("{}, line {line}: {key} is not a known key; expected {expected}", file.display())]
    UnknownKey {
        file: PathBuf,
        line: usize,
        key: String,
        expected: String,
    },
    /// A value of the wrong type or out of range.
    #[error("{}, line {line}: {key} is {value}; expected {expected}", file.display())]
    BadValue {
        file: PathBuf,
        line: usize,
        key: String,
        value: String,
        expected: String,
    },
}

impl Error {
    /// Turns the parser's error into one that names the place.
    pub(super) fn located(text: &str, file: &Path, error: &toml::de::Error) -> Self {
        let file = file.to_path_buf();
        let span = error.span().unwrap_or(0..0);
        let line = 1 + text
            .get(..span.start)
            .map_or(0, |before| before.matches('\n').count());
        let Ok(document) = DeTable::parse(text) else {
            return Self::Syntax {
                file,
                line,
                reason: error.message().replace('\n', ", "),
            };
        };
        let key = key_at(document.get_ref(), &span).unwrap_or_else(|| "the file".to_owned());
        let value = text.get(span).unwrap_or_default().to_owned();
        let (message, expected) = error
            .message()
            .rsplit_once(", expected ")
            .unwrap_or_else(|| (error.message(), "another value"));
        let expected = expected.to_owned();
        if message.starts_with("unknown field") {
            Self::UnknownKey {
                file,
                line,
                key,
                expected,
            }
        } else {
            Self::BadValue {
                file,
                line,
                key,
                value,
                expected,
            }
        }
    }
}

/// The dotted name of the key that `span` lies at: on the key itself or in its value.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let within = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        // A header's table has the span of its header alone, so look inside first.
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(rest) = key_at(inner, span)
        {
            return Some(format!("{name}.{rest}"));
        }
        (within(key.span()) || within(value.span())).then(|| name.to_string())
    })
}
