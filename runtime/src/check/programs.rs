//! The programs that make file systems.

use super::Line;
use crate::images::{MKFS_EROFS, MKFS_EXT4, Tool};

pub(super) fn lines() -> Vec<Line> {
    // erofs-utils 1.5 has no such option, but says its version before it complains.
    vec![
        line(&MKFS_EROFS, "-V", erofs_version),
        line(&MKFS_EXT4, "-V", ext4_version),
    ]
}

fn line(tool: &Tool, ask: &str, version: fn(&str) -> String) -> Line {
    match tool.command().arg(ask).output() {
        Err(error) => Line::fail(
            tool.program,
            error.to_string(),
            format!("install it: apt-get install {}", tool.package),
        ),
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Line::ok(tool.program, version(&String::from_utf8_lossy(&text)))
        }
    }
}

/// From `mkfs.erofs (erofs-utils) 1.8.6`, or `mkfs.erofs 1.5` and a usage.
pub(super) fn erofs_version(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    match first
        .strip_prefix("mkfs.erofs")
        .and_then(|rest| rest.split_whitespace().last())
    {
        Some(version) if version.starts_with(|c: char| c.is_ascii_digit()) => version.to_owned(),
        _ => "of unknown version".to_owned(),
    }
}

/// From `mke2fs 1.47.0 (5-Feb-2023)`.
pub(super) fn ext4_version(text: &str) -> String {
    let version = text
        .lines()
        .next()
        .and_then(|first| first.split_whitespace().nth(1));
    version.unwrap_or("of unknown version").to_owned()
}
