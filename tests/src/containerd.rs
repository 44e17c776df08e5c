//! A containerd of our own: its root, state and socket are in a folder that goes with it.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long containerd may take until it serves; an emulated machine needs seconds.
const START: Duration = Duration::from_secs(90);
/// How long it may take to end.
const STOP: Duration = Duration::from_secs(30);

/// A running containerd, ended and forgotten when dropped.
#[derive(Debug)]
pub struct Containerd {
    /// Taken when it is ended.
    child: Option<Child>,
    home: TempDir,
    binary: PathBuf,
    env: Vec<(String, String)>,
}

impl Containerd {
    /// Starts `binary` (a path, or a name on `PATH`) with `env` added; shims inherit that.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not say that it is ready within 90 s; its log's last
    /// lines are in the text.
    pub fn start(binary: &Path, env: &[(&str, &str)]) -> Result<Self> {
        Self::configured(binary, env, "")
    }

    /// The same, with `more` at the end of its configuration.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn configured(binary: &Path, env: &[(&str, &str)], more: &str) -> Result<Self> {
        // Short: a socket's path has 107 bytes.
        let home = tempfile::Builder::new()
            .prefix("sm-")
            .tempdir()
            .context("no folder")?;
        let config = home.path().join("config.toml");
        let text = configuration(home.path()) + more;
        fs::write(&config, text).context("cannot write its configuration")?;
        let mut containerd = Self {
            child: None,
            home,
            binary: binary.to_owned(),
            env: env
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        };
        containerd.restart()?;
        Ok(containerd)
    }

    /// Starts it where it was, after [`Self::crash`].
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<()> {
        let home = self.home.path();
        let notify = home.join("notify");
        let _ = fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify).context("cannot bind the notification socket")?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(home.join("log"))
            .context("cannot create its log")?;

        let mut command = Command::new(&self.binary);
        command
            .arg("--config")
            .arg(home.join("config.toml"))
            .env("NOTIFY_SOCKET", &notify)
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot clone its log")?)
            .stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        self.child = Some(child);
        self.wait_ready(&ready)
    }

    /// Kills it, as by kill -9; its shims live on.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn crash(&mut self) -> Result<()> {
        let mut child = self.child.take().context("it does not run")?;
        child.kill().context("cannot kill it")?;
        child.wait().context("cannot wait for it")?;
        Ok(())
    }

    /// Ends it in good order; its shims live on.
    ///
    /// # Errors
    /// It does not run.
    pub fn stop(&mut self) -> Result<()> {
        let child = self.child.take().context("it does not run")?;
        end(child);
        Ok(())
    }

    /// The socket it serves.
    pub fn address(&self) -> PathBuf {
        self.home.path().join("s")
    }

    /// Where its snapshotters and contents are.
    pub fn root(&self) -> PathBuf {
        self.home.path().join("root")
    }

    /// Where its bundles are.
    pub fn state(&self) -> PathBuf {
        self.home.path().join("state")
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// All it and its shims have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }

    fn wait_ready(&mut self, ready: &UnixDatagram) -> Result<()> {
        let deadline = Instant::now() + START;
        // Short, so that an early death is noticed; readiness itself arrives as a message.
        ready
            .set_read_timeout(Some(Duration::from_millis(250)))
            .context("no timeout")?;
        let mut message = [0_u8; 256];
        while Instant::now() < deadline {
            if let Ok(count) = ready.recv(&mut message)
                && message
                    .get(..count)
                    .is_some_and(|text| contains(text, b"READY=1"))
            {
                return Ok(());
            }
            let child = self.child.as_mut().context("it was ended")?;
            if let Some(status) = child.try_wait().context("cannot ask for its status")? {
                bail!(
                    "containerd ended with {status}; its log ends:\n{}",
                    tail(&self.log())
                );
            }
        }
        bail!(
            "containerd was not ready after {START:?}; its log ends:\n{}",
            tail(&self.log())
        )
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            end(child);
        }
    }
}

fn end(mut child: Child) {
    let Ok(pid) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return;
    };
    let _ = kill(pid, Signal::SIGTERM);
    let (sender, ended) = mpsc::channel();
    let waiter = thread::spawn(move || sender.send(child.wait()));
    if ended.recv_timeout(STOP).is_err() {
        // Not reaped yet, so the pid is still its own.
        let _ = kill(pid, Signal::SIGKILL);
    }
    let _ = waiter.join();
}

/// Version 2 is read by containerd 1.7 and 2.x alike.
fn configuration(home: &Path) -> String {
    let home = home.display();
    format!(
        r#"version = 2
root = "{home}/root"
state = "{home}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.internal.v1.restart", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]

[grpc]
  address = "{home}/s"

[plugins."io.containerd.internal.v1.opt"]
  path = "{home}/opt"
"#
    )
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines
        .get(lines.len().saturating_sub(12)..)
        .unwrap_or_default()
        .join("\n")
}
