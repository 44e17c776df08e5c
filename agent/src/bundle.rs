//! A container's directory: its config, its root file system, and what its making leaves behind.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::syncfs;
use oci_spec::runtime::{LinuxCapabilities, Mount, Process, Root, Spec};
use serde_json::Serializer;
use supermachine_protocol::protobuf::MessageField;
use supermachine_protocol::{FileContent, Rootfs, Stdio};

use crate::cgroup::{self, Cgroup};
use crate::changes::Changes;
use crate::container::Workshop;
use crate::engine::helper::{SECCOMP, Withheld};
use crate::engine::seccomp::Filter;
use crate::error::Error;
use crate::files;
use crate::rootfs::Assembled;
use crate::sys::lock;
use crate::sysctl;

/// Longest name of a container or a process, in bytes.
const ID_MAX: usize = 128;

/// A container's directory. Whatever of it exists is removed on drop.
pub(crate) struct Bundle {
    id: String,
    path: PathBuf,
    rootfs: Mutex<Option<Assembled>>,
    workshop: Arc<Workshop>,
}

impl Bundle {
    /// Makes an empty one.
    pub(crate) fn make(workshop: Arc<Workshop>, id: &str) -> Result<Self, Error> {
        let path = workshop.containers.join(id);
        DirBuilder::new()
            .mode(0o711)
            .create(&path)
            .map_err(Error::file("create", &path))?;
        Ok(Self {
            id: id.to_owned(),
            path,
            rootfs: Mutex::default(),
            workshop,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Assembles the root file system.
    pub(crate) async fn assemble(&mut self, rootfs: &MessageField<Rootfs>) -> Result<(), Error> {
        let rootfs = rootfs
            .as_ref()
            .ok_or_else(|| Error::invalid("rootfs", "it is missing"))?;
        let workshop = &self.workshop;
        let made = workshop
            .layers
            .assemble(&*workshop.platform, rootfs, &self.path)
            .await?;
        *lock(&self.rootfs) = Some(made);
        Ok(())
    }

    /// Writes the container's files, and has the mounts of the config that are of them find them.
    pub(crate) fn write_files(
        &self,
        files: &[FileContent],
        mounts: &mut [Mount],
    ) -> Result<(), Error> {
        files::write(&self.path, files)?;
        files::locate(&self.path, files, mounts)
    }

    /// What is written to its root file system.
    pub(crate) fn changes(&self) -> Option<Changes> {
        lock(&self.rootfs).as_ref()?.changes.clone()
    }

    /// Fits the config to this guest and writes what the engine and its helpers look for.
    pub(crate) fn write_config(&self, mut spec: Spec, cwd: &Path) -> Result<(), Error> {
        let rootfs = lock(&self.rootfs);
        let path = rootfs
            .as_ref()
            .map(|rootfs| rootfs.path.clone())
            .unwrap_or_default();
        make_directory_in(&path, cwd);
        let mut root = Root::default();
        root.set_readonly(spec.root().as_ref().and_then(|root| root.readonly()));
        root.set_path(path);
        spec.set_root(Some(root));
        let mut linux = spec.linux().clone().unwrap_or_default();
        linux.set_cgroups_path(Some(Cgroup::config_path(&self.id)));
        cgroup::forbid_swap(&mut linux);
        if let Some(profile) = linux.seccomp() {
            let filter = Filter::of(profile).map_err(Error::Program)?;
            let file = self.path.join(SECCOMP);
            filter.write(&file).map_err(Error::file("write", file))?;
        }
        linux.set_seccomp(None);
        // libcontainer knows these by one name each, and makes the first step recursive anyway.
        let propagation = linux
            .rootfs_propagation()
            .as_deref()
            .map(|name| match name {
                "rprivate" | "rshared" | "rslave" | "runbindable" => &name[1..],
                name => name,
            });
        let propagation = propagation.filter(|name| !name.is_empty());
        linux.set_rootfs_propagation(propagation.map(str::to_owned));
        if let Some(parameters) = linux.sysctl_mut() {
            sysctl::set_network(parameters)?;
        }
        spec.set_linux(Some(linux));
        write_json(&self.path.join("config.json"), &spec)
    }

    /// Writes out what the machine's memory still holds of a disk that outlives it, so that it is there
    /// when the host is told that the container has stopped.
    pub(crate) async fn write_out(&self) {
        let keeps = lock(&self.rootfs)
            .as_ref()
            .and_then(|rootfs| rootfs.keeps.clone());
        let Some(path) = keeps else { return };
        let written = tokio::task::spawn_blocking(move || -> io::Result<()> {
            Ok(syncfs(File::open(path)?)?)
        });
        // It fails otherwise only if it panicked.
        if let Ok(Err(error)) = written.await {
            tracing::error!(id = self.id, %error, "cannot write out the container's disk");
        }
    }

    /// Removes it; waits for file systems to be unmounted, which may take long.
    pub(crate) async fn remove(&self) {
        let taken = Self {
            id: self.id.clone(),
            path: self.path.clone(),
            rootfs: Mutex::new(lock(&self.rootfs).take()),
            workshop: self.workshop.clone(),
        };
        // It fails only if unmounting panicked.
        let _ = tokio::task::spawn_blocking(|| drop(taken)).await;
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if let Some(rootfs) = lock(&self.rootfs).take() {
            self.workshop.layers.remove(rootfs);
        }
        let _ = fs::remove_dir_all(self.workshop.state.join(&self.id));
        // Never into directories: should one still be mounted, its content is not ours to remove.
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let _ = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir(entry.path()),
                _ => fs::remove_file(entry.path()),
            };
        }
        if let Err(error) = fs::remove_dir(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove");
        }
    }
}

/// Checks what both kinds of process have in common. Returns the user who owns the streams.
pub(crate) fn check_process(process: &Process, stdio: &Stdio) -> Result<u32, Error> {
    if process.terminal().unwrap_or(false) != stdio.terminal {
        let reason = "the process and its stdio differ in whether there is one";
        return Err(Error::invalid("terminal", reason));
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::invalid("process", "args must not be empty"));
    }
    if !process.cwd().is_absolute() {
        let reason = format!("cwd {:?} is not an absolute path", process.cwd());
        return Err(Error::invalid("process", reason));
    }
    Ok(process.user().uid())
}

/// Takes out of a process what libcontainer isn't told. Capabilities are `otherwise` if it says
/// nothing of them at all.
pub(crate) fn withhold(process: &mut Process, otherwise: Option<LinuxCapabilities>) -> Withheld {
    let capabilities = process.capabilities().clone();
    process.set_capabilities(None);
    let capabilities = capabilities.or(otherwise).unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None)
            .set_effective(None)
            .set_permitted(None)
            .set_inheritable(None)
            .set_ambient(None);
        none
    });
    let cwd = process.cwd().clone();
    process.set_cwd("/".into());
    Withheld {
        capabilities,
        cwd,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
    }
}

/// Checks the name of a container or a process, which becomes part of paths.
pub(crate) fn check_id(what: &'static str, id: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
    if id.is_empty() || id.len() > ID_MAX || matches!(id, "." | "..") || !id.bytes().all(plain) {
        let reason = format!("{id:?} is not 1 to {ID_MAX} characters of [A-Za-z0-9_+.-]");
        return Err(Error::invalid(what, reason));
    }
    Ok(())
}

/// Writes a value to a new file.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), Error> {
    let write = || -> io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        value.serialize(&mut Serializer::new(&mut file))?;
        file.flush()
    };
    write().map_err(Error::file("write", path))
}

/// Creates a container's working directory where its image has none, as runc does.
///
/// What goes wrong shows when the process cannot enter it; a mount over its place comes later, and
/// the process tries again.
fn make_directory_in(root: &Path, path: &Path) {
    let made = || -> nix::Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // Links in an image point into the image.
        let how = OpenHow::new()
            .flags(flags)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let top = open(root, flags, Mode::empty())?;
        let mut parent: OwnedFd = top.try_clone().map_err(|_| Errno::EMFILE)?;
        let mut prefix = PathBuf::new();
        for component in path.components() {
            let Component::Normal(name) = component else {
                continue;
            };
            prefix.push(name);
            parent = match openat2(&top, &prefix, how) {
                Err(Errno::ENOENT) => {
                    mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
                    openat2(&top, &prefix, how)?
                }
                opened => opened?,
            };
        }
        Ok(())
    };
    if let Err(error) = made() {
        tracing::debug!(path = %path.display(), %error, "cannot create the working directory");
    }
}
