//! A running program with deadlines: its output is collected while it runs, and dropping it kills
//! it.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code.
    ///
    /// # Errors
    /// The program was killed.
    pub fn code(&self) -> Result<i32> {
        self.status
            .code()
            .with_context(|| format!("{}: {}", self.status, self.errors()))
    }

    /// Standard output without the white space around it.
    ///
    /// # Errors
    /// The program failed.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            bail!(
                "{}; stdout: {:?}; stderr: {:?}",
                self.status,
                self.text(),
                self.errors()
            );
        }
        Ok(self.text().trim().to_owned())
    }
}

/// A stream being read by a thread.
#[derive(Debug)]
struct Stream {
    chunks: Receiver<Vec<u8>>,
    collected: Vec<u8>,
}

impl Stream {
    fn read(mut source: impl Read + Send + 'static) -> Self {
        let (sender, chunks) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(length) = source.read(&mut buffer) {
                if length == 0 || sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            chunks,
            collected: Vec::new(),
        }
    }

    /// Collects until `enough`; false at the stream's end.
    fn collect(&mut self, until: Instant, enough: impl Fn(&[u8]) -> bool) -> Result<bool> {
        loop {
            if enough(&self.collected) {
                return Ok(true);
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.collected.extend(chunk),
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) => bail!(
                    "deadline passed; so far: {:?}",
                    String::from_utf8_lossy(&self.collected)
                ),
            }
        }
    }
}

/// A running program.
#[derive(Debug)]
pub struct Program {
    child: Child,
    name: String,
    stdin: Option<ChildStdin>,
    stdout: Stream,
    stderr: Stream,
    until: Instant,
}

impl Program {
    /// Starts `command`; everything about it must happen within `deadline`.
    ///
    /// # Errors
    /// It could not be executed.
    pub fn start(mut command: Command, deadline: Duration) -> Result<Self> {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("execute {name}"))?;
        let stdin = child.stdin.take();
        let stdout = Stream::read(child.stdout.take().context("no stdout")?);
        let stderr = Stream::read(child.stderr.take().context("no stderr")?);
        Ok(Self {
            child,
            name,
            stdin,
            stdout,
            stderr,
            until: Instant::now() + deadline,
        })
    }

    /// Runs `command` to its end with nothing on its standard input.
    ///
    /// # Errors
    /// It could not be executed, or did not end in time.
    pub fn run(command: Command, deadline: Duration) -> Result<Finished> {
        let mut program = Self::start(command, deadline)?;
        program.close_stdin();
        program.finish()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// It doesn't read any more.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin
            .write_all(bytes)
            .with_context(|| format!("write to {}", self.name))
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until standard output holds `text`.
    ///
    /// # Errors
    /// It ended, or the deadline passed, before.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        let wanted = text.as_bytes();
        let found = self
            .stdout
            .collect(self.until, |so_far| {
                so_far.windows(wanted.len()).any(|part| part == wanted)
            })
            .with_context(|| format!("{:?} on stdout of {}", text, self.name))?;
        if !found {
            let _ = self.stderr.collect(self.until, |_| false);
            bail!(
                "no {text:?} on stdout of {}: {:?}; stderr: {:?}",
                self.name,
                String::from_utf8_lossy(&self.stdout.collected),
                String::from_utf8_lossy(&self.stderr.collected)
            );
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits for its end and the ends of its streams.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn finish(mut self) -> Result<Finished> {
        for stream in [&mut self.stdout, &mut self.stderr] {
            stream
                .collect(self.until, |_| false)
                .with_context(|| self.name.clone())?;
        }
        let status = wait(&mut self.child, self.until).with_context(|| self.name.clone())?;
        Ok(Finished {
            status,
            stdout: std::mem::take(&mut self.stdout.collected),
            stderr: std::mem::take(&mut self.stderr.collected),
        })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // In vain when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a child's end.
///
/// # Errors
/// It did not end in time.
pub fn wait(child: &mut Child, until: Instant) -> Result<ExitStatus> {
    if let Some(status) = child.try_wait()? {
        return Ok(status);
    }
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now()))?;
    if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left))? == 0 {
        bail!("did not end in time");
    }
    Ok(child.wait()?)
}
