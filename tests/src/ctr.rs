//! `ctr`, containerd's own client.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long one `ctr` may take: a VM in an emulated machine boots for seconds.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// `ctr` against one containerd.
#[derive(Debug, Clone)]
pub struct Ctr {
    binary: PathBuf,
    address: PathBuf,
}

/// What a finished `ctr` left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// From its start to the first byte of standard output.
    pub first_output: Option<Duration>,
    /// From its start to its end.
    pub total: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The same, if it ended with 0.
    ///
    /// # Errors
    /// It ended otherwise; what it said is in the text.
    pub fn success(self) -> Result<Self> {
        if !self.status.success() {
            bail!(
                "{}; stdout: {:?}; stderr: {:?}",
                self.status,
                self.text(),
                self.errors()
            );
        }
        Ok(self)
    }
}

impl Ctr {
    /// `binary` is a path or a name on `PATH`; `address` is containerd's socket.
    pub fn new(binary: impl Into<PathBuf>, address: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            address: address.into(),
        }
    }

    /// containerd's socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// The process of the containerd.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn server(&self) -> Result<u32> {
        let connection = UnixStream::connect(&self.address)
            .with_context(|| format!("connect to {}", self.address.display()))?;
        let peer = rustix::net::sockopt::socket_peercred(&connection)?;
        Ok(u32::try_from(peer.pid.as_raw_nonzero().get())?)
    }

    /// A `ctr` command to add arguments to.
    pub fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--address").arg(&self.address).args(args);
        command
    }

    /// Runs `ctr` with `args` and no input, to its end.
    ///
    /// # Errors
    /// It cannot be started, or has not ended after [`DEADLINE`].
    pub fn output<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        collect(self.command(args), None, DEADLINE)
    }

    /// Imports an OCI archive.
    ///
    /// # Errors
    /// As [`Ctr::output`], and when `ctr` reports a failure.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let archive = archive.to_str().context("an archive's path is UTF-8")?;
        self.output(["images", "import", archive])?.success()?;
        Ok(())
    }
}

/// Runs `command` to its end, with `input` on its standard input.
///
/// # Errors
/// It cannot be started, or has not ended after `deadline`; then it is killed.
pub fn collect(mut command: Command, input: Option<Vec<u8>>, deadline: Duration) -> Result<Output> {
    let begin = Instant::now();
    command.stdin(if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let stdin = child.stdin.take();
    let writer = input
        .zip(stdin)
        .map(|(bytes, pipe)| thread::spawn(move || feed(pipe, &bytes)));
    let (sender, ended) = mpsc::channel::<()>();
    let stdout = read_all(
        child.stdout.take().context("no stdout")?,
        begin,
        sender.clone(),
    );
    let stderr = read_all(child.stderr.take().context("no stderr")?, begin, sender);

    if ended.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
        kill_and_reap(&mut child);
        bail!("{command:?} had not ended after {deadline:?}");
    }
    let status = child.wait().context("cannot wait")?;
    let total = begin.elapsed();
    if let Some(writer) = writer {
        let _ = writer.join();
    }
    let (stdout, first_output) = stdout.join().unwrap_or_default();
    let (stderr, _) = stderr.join().unwrap_or_default();
    Ok(Output {
        status,
        stdout,
        stderr,
        first_output,
        total,
    })
}

fn kill_and_reap(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn feed(mut pipe: ChildStdin, bytes: &[u8]) {
    // A reader that leaves early is the command's own business.
    let _ = pipe.write_all(bytes);
}

type Reading = thread::JoinHandle<(Vec<u8>, Option<Duration>)>;

/// Reads to EOF; `_alive` is dropped then.
fn read_all(
    mut pipe: impl Read + Send + 'static,
    begin: Instant,
    alive: mpsc::Sender<()>,
) -> Reading {
    thread::spawn(move || {
        let (mut all, mut first) = (Vec::new(), None);
        let mut chunk = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = pipe.read(&mut chunk) {
            first.get_or_insert_with(|| begin.elapsed());
            all.extend_from_slice(chunk.get(..count).unwrap_or_default());
        }
        drop(alive);
        (all, first)
    })
}
