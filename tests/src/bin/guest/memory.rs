//! Memory on command.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::commands;

const PAGE: usize = 4096;

pub(crate) fn run() -> Result<()> {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    commands::serve(|words| answer(words, &mut blocks))
}

fn answer(words: &[&str], blocks: &mut Vec<Vec<u8>>) -> Result<String> {
    match *words {
        ["fill", mebibytes] => {
            blocks.push(block(blocks.len(), mebibytes.parse::<usize>()? << 20));
            Ok("filled".to_owned())
        }
        ["fill", "all", "but", mebibytes] => {
            let rest = mebibytes.parse::<usize>()? << 20;
            let bytes = free()?.saturating_sub(rest);
            blocks.push(block(blocks.len(), bytes / PAGE * PAGE));
            Ok("filled".to_owned())
        }
        ["check"] => {
            for (place, block) in blocks.iter().enumerate() {
                for (index, page) in block.chunks(PAGE).enumerate() {
                    if page[..8] != pattern(place, index).to_le_bytes() {
                        bail!("page {index} of block {place} has changed");
                    }
                    if page[8..].iter().any(|byte| *byte != 0) {
                        bail!("page {index} of block {place} has something it never had");
                    }
                }
            }
            Ok("intact".to_owned())
        }
        ["drop"] => {
            blocks.pop();
            Ok("dropped".to_owned())
        }
        ["free"] => {
            blocks.clear();
            Ok("freed".to_owned())
        }
        ["ooms"] => {
            let counters = fs::read_to_string("/proc/vmstat")?;
            let kills = counters
                .lines()
                .find_map(|line| line.strip_prefix("oom_kill "));
            Ok(kills.context("the kernel counts no OOM kills")?.to_owned())
        }
        _ => bail!("no such command: {words:?}"),
    }
}

/// Memory with something of its own in each page.
fn block(place: usize, bytes: usize) -> Vec<u8> {
    let mut block = vec![0; bytes];
    for (index, page) in block.chunks_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&pattern(place, index).to_le_bytes());
    }
    block
}

/// Bytes that the kernel has no use for.
fn free() -> Result<usize> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kibibytes = text.lines().find_map(|line| {
        let value = line.strip_prefix("MemFree:")?.trim().strip_suffix(" kB")?;
        value.parse::<usize>().ok()
    });
    Ok(kibibytes.context("the kernel doesn't tell what is free")? << 10)
}

/// What a page begins with; never 0.
fn pattern(block: usize, page: usize) -> u64 {
    (block as u64 + 1) << 40 | page as u64
}
