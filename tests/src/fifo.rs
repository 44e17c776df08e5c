//! A fifo that a container writes to, read line by line.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A fifo, and our end of it.
#[derive(Debug)]
pub struct Fifo {
    /// Its path.
    pub path: PathBuf,
    // Open for both, so that neither side waits for the other to open it.
    file: File,
    read: Vec<u8>,
}

impl Fifo {
    /// Makes one at `path`.
    ///
    /// # Errors
    /// It is there already, or can't be made.
    pub fn new(path: &Path) -> Result<Self> {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0)
            .with_context(|| format!("make {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file: OpenOptions::new().read(true).write(true).open(path)?,
            read: Vec::new(),
        })
    }

    /// An end to write to.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn writer(&self) -> Result<File> {
        Ok(OpenOptions::new().write(true).open(&self.path)?)
    }

    /// The next line.
    ///
    /// # Errors
    /// There was none within `deadline`.
    pub fn line(&mut self, deadline: Duration) -> Result<String> {
        let until = Instant::now() + deadline;
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            let left = Timespec::try_from(until.saturating_duration_since(Instant::now()))?;
            let ready = poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&left))?;
            ensure!(
                ready > 0,
                "no line within {deadline:?}; so far {:?}",
                String::from_utf8_lossy(&self.read)
            );
            let mut chunk = [0; 4096];
            let count = self.file.read(&mut chunk)?;
            self.read.extend_from_slice(&chunk[..count]);
        }
    }
}
