//! Templates of containerd's mount manager: text that names what earlier mounts of a list show.
//!
//! A mount whose type starts with `format/` may say `{{ mount 0 }}` for where the first mount of the
//! list is mounted, `{{ overlay 1 3 }}` for several of them as overlayfs takes layers (in descending
//! order if the first number is the larger), `{{ source 0 }}` and `{{ target 0 }}` for what that mount
//! itself says (containerd, docs/mounts.md, "Format Transformer").

use std::path::PathBuf;

use crate::request::Mount;

/// Text in which templates have been filled in. Where mounts are stays open: they never exist on the
/// host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    /// Where this mount of the list is.
    Mounted(usize),
    /// What separates the layers of `overlay`; a ':' of the text's own is text.
    Separator,
}

/// A file or directory that a mount names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Host(PathBuf),
    /// Below what another mount of the list shows; "" is all of it.
    Mounted {
        mount: usize,
        path: String,
    },
}

/// Why text can't be filled in or understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Problem {
    Syntax,
    Index,
    Path,
}

impl Problem {
    pub(super) fn expected(self) -> &'static str {
        match self {
            Self::Syntax => {
                "{{ mount N }}, {{ overlay N M }}, {{ source N }} or {{ target N }} between text"
            }
            Self::Index => "numbers of mounts that come before it, counted from 0",
            Self::Path => "an absolute path, or one below {{ mount N }}",
        }
    }
}

/// Fills in the templates of `text`, which belongs to the mount after `earlier`.
pub(super) fn expand(text: &str, earlier: &[Mount]) -> Result<Vec<Piece>, Problem> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let (action, after) = after.split_once("}}").ok_or(Problem::Syntax)?;
        // "{{-" and "-}}" remove white space beside them (Go's text/template).
        let trimmed = action.strip_prefix("- ");
        let before = trimmed.map_or(before, |_| before.trim_end());
        let action = trimmed.unwrap_or(action);
        let trimmed = action.strip_suffix(" -");
        rest = trimmed.map_or(after, |_| after.trim_start());
        let action = trimmed.unwrap_or(action);
        push_text(&mut pieces, before);
        evaluate(action, earlier, &mut pieces)?;
    }
    push_text(&mut pieces, rest);
    Ok(pieces)
}

/// Text without templates.
pub(super) fn literal(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    push_text(&mut pieces, text);
    pieces
}

fn push_text(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        _ if text.is_empty() => {}
        Some(Piece::Text(last)) => last.push_str(text),
        _ => pieces.push(Piece::Text(text.to_owned())),
    }
}

fn evaluate(action: &str, earlier: &[Mount], pieces: &mut Vec<Piece>) -> Result<(), Problem> {
    let words: Vec<&str> = action.split_ascii_whitespace().collect();
    let index = |word: &str| -> Result<usize, Problem> {
        let decimal = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        let index = word.parse().ok().filter(|_| decimal);
        let index: usize = index.ok_or(Problem::Syntax)?;
        (index < earlier.len())
            .then_some(index)
            .ok_or(Problem::Index)
    };
    match words.as_slice() {
        ["mount", at] => pieces.push(Piece::Mounted(index(at)?)),
        ["source", at] => {
            let mount = earlier.get(index(at)?).ok_or(Problem::Index)?;
            push_text(pieces, &mount.source);
        }
        ["target", at] => {
            let mount = earlier.get(index(at)?).ok_or(Problem::Index)?;
            push_text(pieces, &mount.target);
        }
        ["overlay", first, last] => {
            let (first, last) = (index(first)?, index(last)?);
            let range = first.min(last)..=first.max(last);
            let mounts: Vec<usize> = match first <= last {
                true => range.collect(),
                false => range.rev().collect(),
            };
            for (position, mount) in mounts.into_iter().enumerate() {
                if position > 0 {
                    pieces.push(Piece::Separator);
                }
                pieces.push(Piece::Mounted(mount));
            }
        }
        _ => return Err(Problem::Syntax),
    }
    Ok(())
}

/// The one place that `pieces` name.
pub(super) fn place(pieces: &[Piece]) -> Result<Place, Problem> {
    match pieces {
        [Piece::Text(text)] => absolute(text.clone()),
        [Piece::Mounted(mount)] => below(*mount, ""),
        [Piece::Mounted(mount), Piece::Text(text)] => below(*mount, text),
        _ => Err(Problem::Path),
    }
}

/// The places that `pieces` name as overlayfs reads `lowerdir`: with ':' between them, unless a
/// backslash is before it.
pub(super) fn places(pieces: &[Piece]) -> Result<Vec<Place>, Problem> {
    let mut found = vec![Vec::new()];
    let mut push = |piece: Option<Piece>| match (piece, found.last_mut()) {
        (Some(piece), Some(last)) => last.push(piece),
        _ => found.push(Vec::new()),
    };
    for piece in pieces {
        match piece {
            Piece::Text(text) => {
                for (position, part) in split_layers(text).into_iter().enumerate() {
                    if position > 0 {
                        push(None);
                    }
                    if !part.is_empty() {
                        push(Some(Piece::Text(part)));
                    }
                }
            }
            Piece::Mounted(mount) => push(Some(Piece::Mounted(*mount))),
            Piece::Separator => push(None),
        }
    }
    found.iter().map(|pieces| place(pieces)).collect()
}

fn absolute(text: String) -> Result<Place, Problem> {
    let path = PathBuf::from(text);
    match path.is_absolute() {
        true => Ok(Place::Host(path)),
        false => Err(Problem::Path),
    }
}

/// `text` is what follows the place of `mount`: nothing, or a path that starts with a slash and does
/// not lead out again.
fn below(mount: usize, text: &str) -> Result<Place, Problem> {
    let mut parts = text.split('/');
    if parts.next() != Some("") {
        return Err(Problem::Path);
    }
    let parts: Vec<&str> = parts.filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(Problem::Path);
    }
    let path = parts.join("/");
    Ok(Place::Mounted { mount, path })
}

/// Splits at each ':' that has no backslash before it, as overlayfs does.
pub(crate) fn split_layers(value: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut chars = value.chars();
    while let Some(char) = chars.next() {
        let next = match char {
            '\\' => chars.next(),
            ':' => {
                layers.push(String::new());
                None
            }
            other => Some(other),
        };
        if let Some(layer) = layers.last_mut() {
            layer.extend(next);
        }
    }
    layers
}

/// Without the backslashes that overlayfs wants before some characters of an option.
pub(super) fn unescape(value: &str) -> String {
    let mut chars = value.chars();
    std::iter::from_fn(|| match chars.next()? {
        '\\' => chars.next(),
        other => Some(other),
    })
    .collect()
}

#[cfg(test)]
mod tests;
