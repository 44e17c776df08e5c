//! A containerd of our own: its root, state and socket are in a folder that goes with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::daemon;

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
        let mut command = Command::new(&self.binary);
        command
            .arg("--config")
            .arg(home.join("config.toml"))
            .envs(self.env.iter().map(|(key, value)| (key, value)));
        self.child = Some(daemon::start(command, home)?);
        Ok(())
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
        daemon::end(child);
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
        daemon::log(self.home.path())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            daemon::end(child);
        }
    }
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
