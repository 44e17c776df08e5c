//! A program in a terminal of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::program::wait;

/// How long a program that was told of a size has before it is told again.
const TOLD_AGAIN: Duration = Duration::from_secs(1);

/// A running program whose standard streams are a terminal.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    ours: File,
    chunks: Receiver<Vec<u8>>,
    shown: String,
    until: Instant,
}

impl Terminal {
    /// Starts `command` with a terminal of this size as its controlling terminal.
    ///
    /// # Errors
    /// There is no terminal, or no `setsid`.
    pub fn start(command: &Command, columns: u16, rows: u16, deadline: Duration) -> Result<Self> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let name = ptsname(&ours, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
        tcsetwinsize(&theirs, size(columns, rows))?;
        // Making it the controlling terminal, which is what window changes are told by, takes a
        // step between fork and exec that setsid(1) does.
        let child = Command::new("setsid")
            .args(["--ctty", "--"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::from(theirs.try_clone()?))
            .stdout(Stdio::from(theirs.try_clone()?))
            .stderr(Stdio::from(theirs))
            .spawn()
            .context("execute setsid")?;
        let ours = File::from(ours);
        let mut source = ours.try_clone()?;
        let (sender, chunks) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // It fails with EIO when nobody has the other side any more.
            while let Ok(length) = source.read(&mut buffer) {
                if length == 0 || sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            ours,
            chunks,
            shown: String::new(),
            until: Instant::now() + deadline,
        })
    }

    /// Changes the window's size, and tells the program of it until `text` is shown: ctr listens
    /// only after it has passed the first size on, and nothing tells when that is.
    ///
    /// # Errors
    /// As those of [`Self::expect`].
    pub fn resize_until(&mut self, columns: u16, rows: u16, text: &str) -> Result<String> {
        tcsetwinsize(&self.ours, size(columns, rows))?;
        while Instant::now() < self.until {
            if let Some(shown) = self.expect_for(text, TOLD_AGAIN)? {
                return Ok(shown);
            }
            kill_process(Pid::from_child(&self.child), Signal::WINCH)?;
        }
        self.expect(text)
    }

    /// Types.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.ours.write_all(text.as_bytes())?)
    }

    /// Waits until `text` is shown, carriage returns aside; returns all that was shown up to then
    /// and forgets it.
    ///
    /// # Errors
    /// The program ended, or the deadline passed, before.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        let left = self.until.saturating_duration_since(Instant::now());
        let shown = self.expect_for(text, left)?;
        shown.with_context(|| {
            let all = &self.shown;
            format!("{text:?} in the terminal: deadline passed; shown: {all:?}")
        })
    }

    /// As [`Self::expect`], or nothing once so much time has passed.
    fn expect_for(&mut self, text: &str, limit: Duration) -> Result<Option<String>> {
        let until = Instant::now() + limit;
        loop {
            if let Some(at) = self.shown.find(text) {
                let rest = self.shown.split_off(at + text.len());
                return Ok(Some(std::mem::replace(&mut self.shown, rest)));
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                // Two line disciplines each add one.
                Ok(chunk) => {
                    let chunk = String::from_utf8_lossy(&chunk);
                    self.shown.extend(chunk.chars().filter(|c| *c != '\r'));
                }
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{text:?} in the terminal: ended; shown: {:?}", self.shown)
                }
            }
        }
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn finish(mut self) -> Result<ExitStatus> {
        wait(&mut self.child, self.until).with_context(|| format!("shown: {:?}", self.shown))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // In vain when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
