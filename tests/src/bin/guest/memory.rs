//! Memory on command: the host writes lines to a console port and reads the answers there.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The first port of the first virtio device.
const PORT: &str = "/dev/vport0p0";
const PAGE: usize = 4096;

pub(crate) fn run() -> Result<()> {
    // It comes soon after the driver; there is nothing to wait on before it is there.
    while !Path::new(PORT).exists() {
        thread::sleep(Duration::from_millis(5));
    }
    let port = File::options()
        .read(true)
        .write(true)
        .open(PORT)
        .with_context(|| format!("cannot open {PORT}"))?;
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    let mut lines = BufReader::new(port.try_clone().context("one more descriptor")?);
    loop {
        let mut line = String::new();
        if lines
            .read_line(&mut line)
            .context("cannot read a command")?
            == 0
        {
            return Ok(());
        }
        let answer = answer(line.trim(), &mut blocks).unwrap_or_else(|error| format!("{error:#}"));
        writeln!(&port, "{answer}").context("cannot answer")?;
    }
}

fn answer(line: &str, blocks: &mut Vec<Vec<u8>>) -> Result<String> {
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["fill", mebibytes] => {
            let bytes = mebibytes.parse::<usize>()? << 20;
            let mut block = vec![0; bytes];
            for (index, page) in block.chunks_mut(PAGE).enumerate() {
                let number = pattern(blocks.len(), index);
                page[..8].copy_from_slice(&number.to_le_bytes());
            }
            blocks.push(block);
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
        _ => bail!("no such command: {line:?}"),
    }
}

/// What a page begins with; never 0.
fn pattern(block: usize, page: usize) -> u64 {
    (block as u64 + 1) << 40 | page as u64
}
