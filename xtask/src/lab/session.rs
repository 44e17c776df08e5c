//! The host's side of a session: bring files, run a command, stream its output, take /out back.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::channel::{self, Frames, Kind, Request};
use super::machine::Lab;
use crate::paths;
use crate::step::quiet;

/// How long a lab may take to answer at all; an icount lab on a busy machine is slow.
const BOOT_DEADLINE: Duration = Duration::from_secs(330);
/// After this without an answer, `Hello` is said again: an earlier one may have been swallowed
/// by the rest of a frame some dead session left.
const HELLO_AGAIN: Duration = Duration::from_secs(3);
/// How long the lab has to end a command and send /out once time is up.
const KILL_DEADLINE: Duration = Duration::from_secs(60);

/// The status `timeout` gives too.
const TIMED_OUT: i32 = 124;

/// The lab itself ended or stands still, and with it what ran in it.
#[derive(Debug)]
pub(crate) struct Broken(String);

impl std::fmt::Display for Broken {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

/// An open channel to a lab that has said it is ready.
pub(super) struct Session<'lab> {
    lab: &'lab Lab,
    stream: UnixStream,
    frames: Receiver<(Kind, Vec<u8>)>,
}

/// What a run brings, and what becomes of its results.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Copied to /mnt/<last part of the name>.
    pub(super) add: Vec<PathBuf>,
    /// Installed over the lab's root.
    pub(super) install: Option<PathBuf>,
    /// Where what the command left in /out goes.
    pub(super) out: Option<PathBuf>,
    pub(super) timeout: Option<Duration>,
    /// A command that says nothing for so long is ended too: it hangs, or the lab does.
    pub(super) silence: Option<Duration>,
}

impl<'lab> Session<'lab> {
    /// Connects, and waits until the lab is up and no earlier session runs.
    pub(super) fn open(lab: &'lab Lab) -> Result<Self> {
        let deadline = Instant::now() + BOOT_DEADLINE;
        let stream = connect(lab, deadline)?;
        let mut reader = stream.try_clone().context("cannot clone the channel")?;
        let (sender, frames) = mpsc::sync_channel(64);
        thread::spawn(move || {
            let mut parser = Frames::default();
            while let Ok(Some(frame)) = parser.next(&mut reader) {
                if sender.send(frame).is_err() {
                    return;
                }
            }
        });
        let mut session = Self {
            lab,
            stream,
            frames,
        };
        session.greet(deadline)?;
        Ok(session)
    }

    fn greet(&mut self, deadline: Instant) -> Result<()> {
        let number = format!("{}-{:?}", std::process::id(), Instant::now());
        loop {
            self.send(Kind::Hello, number.as_bytes())?;
            let again = Instant::now() + HELLO_AGAIN;
            loop {
                match self
                    .frames
                    .recv_timeout(again.saturating_duration_since(Instant::now()))
                {
                    Ok((Kind::Ready, payload)) if payload == number.as_bytes() => return Ok(()),
                    Ok((Kind::Stderr, text)) => bail!("{}", String::from_utf8_lossy(&text).trim()),
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return Err(self.gone()),
                }
            }
            if Instant::now() > deadline {
                bail!(
                    "the lab did not answer within {} s; its console ends with:\n{}",
                    BOOT_DEADLINE.as_secs(),
                    self.lab.console_tail()
                );
            }
        }
    }

    /// Runs one command to its end and returns its exit status.
    pub(super) fn run(
        mut self,
        mut request: Request,
        load: &Load,
        stdout: &mut dyn Write,
    ) -> Result<i32> {
        write_exchange(self.lab, load, &mut request)?;
        request.out = load.out.is_some();
        let mut begin = Instant::now();
        let json = serde_json::to_vec(&request).context("cannot encode the request")?;
        self.send(Kind::Run, &json)?;
        self.forward_stdin(request.tty.is_some())?;

        let out = load.out.as_deref().map(Unpacker::start).transpose()?;
        // Counted from the command's own start, once the lab has said so.
        let mut end = load.timeout.map(|timeout| begin + BOOT_DEADLINE + timeout);
        let mut heard = None;
        let mut timed_out = false;
        loop {
            let silent = heard.zip(load.silence.filter(|_| !timed_out));
            let silent = silent.map(|(heard, silence)| heard + silence);
            let frame = match end.into_iter().chain(silent).min() {
                Some(next) => self
                    .frames
                    .recv_timeout(next.saturating_duration_since(Instant::now())),
                None => self
                    .frames
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
            };
            if frame.is_ok() {
                heard = heard.map(|_| Instant::now());
            }
            match frame {
                Ok((Kind::Started, _)) => {
                    begin = Instant::now();
                    heard = Some(begin);
                    end = load.timeout.map(|timeout| begin + timeout);
                }
                Ok((Kind::Stdout, bytes)) => write_all(stdout, &bytes)?,
                Ok((Kind::Stderr, bytes)) => write_all(&mut io::stderr(), &bytes)?,
                Ok((Kind::Out, bytes)) => {
                    if let Some(out) = &out {
                        out.push(bytes);
                    }
                }
                Ok((Kind::Exit, status)) => {
                    out.map(Unpacker::finish).transpose()?;
                    let status = status.try_into().map(i32::from_le_bytes).unwrap_or(125);
                    return Ok(if timed_out { TIMED_OUT } else { status });
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if !timed_out => {
                    let silent = heard.map_or(0, |heard| heard.elapsed().as_secs());
                    eprintln!(
                        "xtask: time is up after {} s, {silent} s of silence: ending the command",
                        begin.elapsed().as_secs()
                    );
                    timed_out = true;
                    end = Some(Instant::now() + KILL_DEADLINE);
                    self.send(Kind::Kill, &[])?;
                }
                Err(RecvTimeoutError::Timeout) => {
                    let error = Broken(format!(
                        "the lab stands still; its console ends with:\n{}",
                        self.lab.console_tail()
                    ));
                    self.lab.end()?;
                    return Err(error.into());
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone()),
            }
        }
    }

    fn forward_stdin(&self, tty: bool) -> Result<()> {
        let mut stream = self
            .stream
            .try_clone()
            .context("cannot clone the channel")?;
        if io::stdin().is_terminal() && !tty {
            return channel::send(&mut stream, Kind::Stdin, &[]).context("cannot reach the lab");
        }
        // Not joined: a read of standard input can't be ended, and the process is about to.
        thread::spawn(move || {
            let mut chunk = [0; 16 * 1024];
            loop {
                let count = io::stdin().read(&mut chunk).unwrap_or(0);
                let bytes = chunk.get(..count).unwrap_or_default();
                if channel::send(&mut stream, Kind::Stdin, bytes).is_err() || count == 0 {
                    return;
                }
            }
        });
        Ok(())
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        channel::send(&mut self.stream, kind, payload).map_err(|_| self.gone())
    }

    fn gone(&self) -> anyhow::Error {
        let log = fs::read_to_string(self.lab.dir.join("qemu.log")).unwrap_or_default();
        let log: Vec<&str> = log
            .lines()
            .filter(|line| !line.contains("TCG doesn't"))
            .collect();
        let error = Broken(format!(
            "the lab ended; its console ends with:\n{}\n{}",
            self.lab.console_tail(),
            log.join("\n")
        ));
        error.into()
    }
}

fn connect(lab: &Lab, deadline: Instant) -> Result<UnixStream> {
    // A process that is replacing itself by QEMU has no command line for a moment.
    let mut unseen = 0;
    loop {
        let error = match UnixStream::connect(lab.channel()) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        unseen = if lab.alive() { 0 } else { unseen + 1 };
        if unseen > 50 || Instant::now() > deadline {
            let log = fs::read_to_string(lab.dir.join("qemu.log")).unwrap_or_default();
            bail!("cannot reach the lab ({error}); QEMU said:\n{log}");
        }
        // QEMU makes its socket within milliseconds; there is no event to wait for.
        thread::sleep(Duration::from_millis(10));
    }
}

/// Writes what the command needs to the exchange disk, which the lab doesn't use now.
fn write_exchange(lab: &Lab, load: &Load, request: &mut Request) -> Result<()> {
    request.install = load.install.is_some();
    if load.add.is_empty() && load.install.is_none() {
        return Ok(());
    }
    let stage = tempfile::tempdir_in(&lab.dir).context("cannot make a staging folder")?;
    for dir in &load.add {
        let dir = fs::canonicalize(dir).with_context(|| format!("no folder {}", dir.display()))?;
        let name = dir
            .file_name()
            .context("a folder without a name")?
            .to_string_lossy();
        if request.mounts.iter().any(|mount| *mount == name) {
            bail!("two folders to add are named {name}");
        }
        copy(&dir, &stage.path().join("mnt").join(&*name))?;
        request.mounts.push(name.into_owned());
    }
    if let Some(root) = &load.install {
        copy(root, &stage.path().join("build"))?;
    }
    let image = lab.exchange();
    let file = File::options()
        .write(true)
        .open(&image)
        .context("no exchange disk")?;
    let size = file.metadata().context("no exchange disk")?.len();
    // Emptied in place: QEMU has it open.
    file.set_len(0)
        .and_then(|()| file.set_len(size))
        .context("cannot empty the exchange disk")?;
    quiet(
        Command::new("mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-O",
                "^has_journal,^metadata_csum",
                "-m",
                "0",
                "-d",
            ])
            .arg(stage.path())
            .arg(&image),
    )
}

/// Copies a folder, by hard links where that is possible.
fn copy(from: &Path, to: &Path) -> Result<()> {
    paths::make_dir(to)?;
    let contents = from.join(".");
    let linked = Command::new("cp")
        .arg("-al")
        .arg(&contents)
        .arg(to)
        .stderr(Stdio::null())
        .status();
    if linked.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    quiet(
        Command::new("cp")
            .args(["-a", "--remove-destination"])
            .arg(&contents)
            .arg(to),
    )
}

fn write_all(stream: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    stream
        .write_all(bytes)
        .and_then(|()| stream.flush())
        .context("cannot write the output")
}

/// Unpacks the tar archive of /out while it arrives.
struct Unpacker {
    bytes: mpsc::Sender<Vec<u8>>,
    thread: thread::JoinHandle<io::Result<()>>,
}

impl Unpacker {
    fn start(to: &Path) -> Result<Self> {
        paths::make_dir(to)?;
        let (bytes, received) = mpsc::channel();
        let to = to.to_path_buf();
        let thread = thread::spawn(move || {
            let source = Chunks {
                received,
                held: io::Cursor::default(),
            };
            let mut archive = tar::Archive::new(source);
            archive.set_overwrite(true);
            archive.unpack(to)
        });
        Ok(Self { bytes, thread })
    }

    fn push(&self, bytes: Vec<u8>) {
        let _ = self.bytes.send(bytes);
    }

    fn finish(self) -> Result<()> {
        drop(self.bytes);
        match self.thread.join() {
            Ok(result) => result.context("cannot unpack what the command left in /out"),
            Err(_) => bail!("unpacking /out panicked"),
        }
    }
}

struct Chunks {
    received: Receiver<Vec<u8>>,
    held: io::Cursor<Vec<u8>>,
}

impl Read for Chunks {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.held.read(to)? {
                0 => match self.received.recv() {
                    Ok(next) => self.held = io::Cursor::new(next),
                    Err(_) => return Ok(0),
                },
                count => return Ok(count),
            }
        }
    }
}
