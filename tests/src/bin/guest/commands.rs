//! The host writes lines to a console port and reads the answers there.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// The first port of the first virtio device.
const PORT: &str = "/dev/vport0p0";

/// Answers each line's words, until there are no more.
pub(crate) fn serve(mut answer: impl FnMut(&[&str]) -> Result<String>) -> Result<()> {
    // It comes soon after the driver; there is nothing to wait on before it is there.
    while !Path::new(PORT).exists() {
        thread::sleep(Duration::from_millis(5));
    }
    let port = File::options()
        .read(true)
        .write(true)
        .open(PORT)
        .with_context(|| format!("cannot open {PORT}"))?;
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
        let words: Vec<_> = line.split_whitespace().collect();
        let answer = answer(&words).unwrap_or_else(|error| format!("{error:#}"));
        writeln!(&port, "{answer}").context("cannot answer")?;
    }
}
