//! A dockerd of our own on a containerd that runs already, and its client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon;
use crate::host::unique;
use crate::program::{Finished, Program};

/// The image that [`Docker::import`] makes.
pub const IMAGE: &str = "busybox";
/// The runtime's name in `daemon.json`.
pub const NAME: &str = "under-test";

/// A running dockerd, ended and forgotten when dropped.
#[derive(Debug)]
pub struct Docker {
    /// Taken when it is ended.
    child: Option<Child>,
    home: TempDir,
    deadline: Duration,
}

impl Docker {
    /// Starts one on the containerd at `containerd`. Its runtime is `runtime`, by name and by
    /// default; `more` is added to its `daemon.json`.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not say that it is ready.
    pub fn start(
        containerd: &Path,
        runtime: &str,
        more: &Value,
        deadline: Duration,
    ) -> Result<Self> {
        // On a disk, and short: a socket's path has 107 bytes.
        let home = tempfile::Builder::new()
            .prefix("dk-")
            .tempdir_in("/var/tmp")
            .context("no folder")?;
        let path = |name: &str| home.path().join(name);
        let mut config = json!({
            "data-root": path("data"),
            "exec-root": path("run"),
            "pidfile": path("pid"),
            "hosts": [format!("unix://{}", path("s").display())],
            "containerd": containerd,
            "runtimes": {NAME: {"runtimeType": runtime}},
            "default-runtime": NAME,
            // The host's rules are not this daemon's to change.
            "iptables": false,
            "ip6tables": false,
            "ip-forward": false,
            "ip-masq": false,
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        fs::write(path("daemon.json"), config.to_string())
            .context("cannot write its configuration")?;
        let mut command = Command::new("dockerd");
        command.arg("--config-file").arg(path("daemon.json"));
        let child = daemon::start(command, home.path())?;
        Ok(Self {
            child: Some(child),
            home,
            deadline,
        })
    }

    /// A client's command with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command
            .arg("--host")
            .arg(format!("unix://{}", self.home.path().join("s").display()))
            .args(args)
            .env("DOCKER_CONFIG", self.home.path().join("client"));
        command
    }

    /// Runs the client to its end.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn run(&self, args: &[&str]) -> Result<Finished> {
        Program::run(self.command(args), self.deadline)
    }

    /// Runs the client, which must succeed; what it says, without the white space around it.
    ///
    /// # Errors
    /// It failed.
    pub fn say(&self, args: &[&str]) -> Result<String> {
        self.run(args)?.success()
    }

    /// Starts the client and stays connected to its streams.
    ///
    /// # Errors
    /// It could not be executed.
    pub fn begin(&self, args: &[&str]) -> Result<Program> {
        Program::start(self.command(args), self.deadline)
    }

    /// Makes an image of a folder.
    ///
    /// # Errors
    /// `tar` or the client failed.
    pub fn import(&self, files: &Path) -> Result<()> {
        let archive = self.home.path().join("image.tar");
        let status = Command::new("tar")
            .arg("-C")
            .arg(files)
            .arg("-cf")
            .arg(&archive)
            .arg(".")
            .stdin(Stdio::null())
            .status()
            .context("cannot run tar")?;
        anyhow::ensure!(status.success(), "tar: {status}");
        let archive = archive.to_str().context("a path that isn't UTF-8")?;
        let change = "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin";
        self.say(&["import", "--change", change, archive, IMAGE])?;
        Ok(())
    }

    /// What `docker inspect` tells of a thing, in a template's words.
    ///
    /// # Errors
    /// There is no such thing.
    pub fn inspect(&self, template: &str, name: &str) -> Result<String> {
        self.say(&["inspect", "--format", template, name])
    }

    /// A container in the background that runs a shell script.
    ///
    /// # Errors
    /// It didn't start.
    pub fn detach(&self, options: &[&str], script: &str) -> Result<Container<'_>> {
        let name = unique("docker");
        let container = Container { docker: self, name };
        let mut args = vec!["run", "--detach", "--name", &container.name];
        args.extend(options);
        args.extend([IMAGE, "sh", "-c", script]);
        self.say(&args)?;
        Ok(container)
    }

    /// Its data.
    pub fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        daemon::log(self.home.path())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            daemon::end(child);
        }
    }
}

/// A container, removed when dropped.
#[derive(Debug)]
pub struct Container<'a> {
    docker: &'a Docker,
    /// What Docker calls it.
    pub name: String,
}

impl Container<'_> {
    /// Runs a shell script in it.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn sh(&self, script: &str) -> Result<Finished> {
        self.docker.run(&["exec", &self.name, "sh", "-c", script])
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // It fails when the test has removed it.
        let _ = self.docker.run(&["rm", "--force", &self.name]);
    }
}
