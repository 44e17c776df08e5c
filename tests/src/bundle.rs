//! OCI bundles made by hand, for driving a shim without containerd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::program::Program;

const PATIENCE: Duration = Duration::from_secs(120);

/// A folder with `config.json` and `rootfs`, and an image's files beside it.
#[derive(Debug)]
pub struct Bundle {
    /// Where the shim is started.
    pub dir: PathBuf,
    /// The image's files, as a snapshotter has them.
    pub files: PathBuf,
}

impl Bundle {
    /// Makes a bundle below `parent` that runs `args` in `files`.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn new(parent: &Path, id: &str, files: &Path, args: &[&str]) -> Result<Self> {
        let dir = parent.join(id);
        fs::create_dir_all(dir.join("rootfs"))
            .with_context(|| format!("make {}", dir.display()))?;
        let bundle = Self {
            dir,
            files: files.to_owned(),
        };
        bundle.write_config(&spec(id, args))?;
        Ok(bundle)
    }

    /// Replaces `config.json`.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write_config(&self, spec: &Value) -> Result<()> {
        Ok(fs::write(self.dir.join("config.json"), spec.to_string())?)
    }
}

/// The cgroup in which bundles of ours have theirs. It stays, as with runc: nobody knows whose it is.
pub const CGROUP: &str = "supermachine-tests";

/// What containerd would write for a busybox container, as far as it matters.
pub fn spec(id: &str, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": ["CAP_KILL", "CAP_CHOWN"],
                "effective": ["CAP_KILL", "CAP_CHOWN"],
                "permitted": ["CAP_KILL", "CAP_CHOWN"]
            }
        },
        "root": { "path": "rootfs" },
        "hostname": id,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] }
        ],
        "linux": {
            "cgroupsPath": format!("/{CGROUP}/{id}"),
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "network" }
            ]
        }
    })
}

/// Unpacks an OCI archive of one image into `to`.
///
/// # Errors
/// It is no such archive.
pub fn unpack(archive: &Path, to: &Path) -> Result<()> {
    let blobs = tempfile::tempdir()?;
    tar(&["--extract", "--file"], archive, blobs.path())?;
    let index = read_json(&blobs.path().join("index.json"))?;
    let manifest = read_json(&blob(blobs.path(), &index["manifests"][0])?)?;
    fs::create_dir_all(to)?;
    for layer in manifest["layers"]
        .as_array()
        .context("manifest without layers")?
    {
        tar(&["--extract", "--file"], &blob(blobs.path(), layer)?, to)?;
    }
    Ok(())
}

fn blob(blobs: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"]
        .as_str()
        .context("descriptor without digest")?;
    Ok(blobs.join("blobs").join(digest.replace(':', "/")))
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

fn tar(how: &[&str], archive: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(how).arg(archive).arg("--directory").arg(to);
    Program::run(command, PATIENCE)?.success().map(drop)
}
