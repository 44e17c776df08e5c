//! Disks on command, which may be empty at first.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::commands;

pub(crate) fn run() -> Result<()> {
    commands::serve(answer)
}

fn answer(words: &[&str]) -> Result<String> {
    let device = |disk: &str| format!("/dev/{disk}");
    match *words {
        ["sectors", disk] => {
            let mut content = File::open(device(disk)).context("cannot open the disk")?;
            let size = content.seek(SeekFrom::End(0)).context("it has no size")?;
            Ok((size / 512).to_string())
        }
        ["digest", disk] => {
            let mut content = File::open(device(disk)).context("cannot open the disk")?;
            let mut digest = Sha256::new();
            io::copy(&mut content, &mut digest).context("cannot read the disk")?;
            Ok(format!("{:x}", digest.finalize()))
        }
        ["write", disk, text] => {
            let content = File::options().write(true).open(device(disk));
            let content = content.context("cannot open the disk")?;
            content.write_all_at(text.as_bytes(), 0)?;
            content.sync_all().context("cannot write to the disk")?;
            Ok("written".to_owned())
        }
        _ => bail!("no such command: {words:?}"),
    }
}
