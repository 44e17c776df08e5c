//! A containerd of our own on this host: own root, state and socket; an installed one is not
//! touched. It prepares the lab's images, and runs demo and tests where KVM is native.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::arch::Arch;
use crate::step::{quiet, text};
use crate::{apt, paths};

/// The containerds that everything is tried on. The binaries of both run on any Debian since 12.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum Version {
    /// Debian stable's
    #[value(name = "1.7")]
    Stable,
    /// The newest that is packaged
    #[default]
    #[value(name = "2.x")]
    Newest,
}

impl Version {
    pub(crate) const ALL: [Self; 2] = [Self::Newest, Self::Stable];

    /// As the command line names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stable => "1.7",
            Self::Newest => "2.x",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::Stable => "trixie",
            Self::Newest => "sid",
        }
    }
}

/// What of containerd no run of ours uses. Kubernetes' side costs seconds of start in the lab.
pub(crate) const CONFIG: &str = include_str!("containerd.toml");

/// The folder with containerd, ctr and runc's shim, fetched now if the cache doesn't hold it.
pub(crate) fn binaries(version: Version, arch: Arch) -> Result<PathBuf> {
    let home = paths::cache()?.join("containerd");
    let dir = home.join(arch.suffixed(version.suite()));
    let bin = dir.join("usr/bin");
    if !bin.join("containerd").exists() {
        let _lock = paths::lock(&home, "fetch")?;
        for deb in apt::Suite::open_for(version.suite(), arch)?.download(&["containerd"])? {
            apt::unpack(&deb, &dir)?;
        }
    }
    Ok(bin)
}

/// A running containerd; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Containerd {
    child: Child,
    bin: PathBuf,
    socket: PathBuf,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // SIGTERM lets it close its databases; it does so in milliseconds.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

impl Containerd {
    /// Starts one with its data in `root`, and state, socket and log in `state`. `path` goes before
    /// `PATH`: there it looks for shims.
    pub(crate) fn start(
        version: Version,
        root: &Path,
        state: &Path,
        path: &[&Path],
        env: &[(&str, &Path)],
    ) -> Result<Self> {
        let bin = binaries(version, Arch::HOST)?;
        paths::make_dir(state)?;
        let (config, socket) = (state.join("config.toml"), state.join("containerd.sock"));
        fs::write(&config, CONFIG).context("cannot write containerd's configuration")?;
        let log = fs::File::create(state.join("containerd.log")).context("cannot make a log")?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(bin.join("containerd"))
            .args([Path::new("--config"), &config, Path::new("--root"), root])
            .args([
                Path::new("--state"),
                &state.join("state"),
                Path::new("--address"),
                &socket,
            ])
            .env("PATH", search_path(&bin, path)?)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        let mut this = Self { child, bin, socket };
        this.wait(state)?;
        Ok(this)
    }

    fn wait(&mut self, state: &Path) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(&self.socket).is_err() {
            let ended = self.child.try_wait().context("cannot look at containerd")?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(state.join("containerd.log")).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines
                    .get(lines.len().saturating_sub(10)..)
                    .unwrap_or_default();
                bail!(
                    "containerd did not come up; its log ends with:\n{}",
                    tail.join("\n")
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// `ctr` for this containerd.
    pub(crate) fn ctr(&self) -> Command {
        let mut command = Command::new(self.bin.join("ctr"));
        command.arg("--address").arg(&self.socket);
        command
    }

    /// Imports the archives of a folder whose images it doesn't hold.
    pub(crate) fn import(&self, images: &Path) -> Result<()> {
        let held = text(self.ctr().args(["images", "ls", "-q"]))?;
        for image in crate::images::IMAGES {
            if !held.lines().any(|name| name == image.reference) {
                quiet(
                    self.ctr()
                        .args(["images", "import"])
                        .arg(images.join(image.file)),
                )?;
            }
        }
        Ok(())
    }
}

/// `PATH` with these folders first.
pub(crate) fn search_path(bin: &Path, more: &[&Path]) -> Result<std::ffi::OsString> {
    let inherited = std::env::var_os("PATH").unwrap_or_default();
    let all = more
        .iter()
        .map(|dir| dir.to_path_buf())
        .chain([bin.to_path_buf()])
        .chain(std::env::split_paths(&inherited));
    std::env::join_paths(all).context("a folder with a colon in its name can't be in PATH")
}
