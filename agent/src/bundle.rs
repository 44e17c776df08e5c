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
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Process, Root, Spec};
use serde_json::Serializer;
use supermachine_protocol::protobuf::MessageField;
use supermachine_protocol::{Rootfs, Stdio};

use crate::cgroup::Cgroup;
use crate::container::Workshop;
use crate::error::Error;
use crate::rootfs::Assembled;
use crate::sys::lock;

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

    /// Fits the config to this guest and writes it where the engine looks for it.
    pub(crate) fn write_config(&self, mut spec: Spec) -> Result<(), Error> {
        let rootfs = lock(&self.rootfs);
        let path = rootfs
            .as_ref()
            .map(|rootfs| rootfs.path.clone())
            .unwrap_or_default();
        if let Some(process) = spec.process() {
            make_directory_in(&path, process.cwd());
        }
        let mut root = Root::default();
        root.set_readonly(spec.root().as_ref().and_then(|root| root.readonly()));
        root.set_path(path);
        spec.set_root(Some(root));
        let mut linux = spec.linux().clone().unwrap_or_default();
        linux.set_cgroups_path(Some(Cgroup::config_path(&self.id)));
        spec.set_linux(Some(linux));
        if let Some(process) = spec.process_mut() {
            complete_capabilities(process, None);
        }
        write_json(&self.path.join("config.json"), &spec)
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

/// Fills in the capabilities that a process leaves out: `otherwise`, if it says nothing of them at
/// all, and none for each set it doesn't mention. libcontainer would leave such a set as the agent
/// has it; runc empties it.
pub(crate) fn complete_capabilities(process: &mut Process, otherwise: Option<LinuxCapabilities>) {
    let mut all = process
        .capabilities()
        .clone()
        .or(otherwise)
        .unwrap_or_else(|| {
            let mut none = LinuxCapabilities::default();
            none.set_bounding(None)
                .set_effective(None)
                .set_permitted(None)
                .set_inheritable(None)
                .set_ambient(None);
            none
        });
    let complete = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
    let (bounding, effective) = (complete(all.bounding()), complete(all.effective()));
    let (permitted, inheritable) = (complete(all.permitted()), complete(all.inheritable()));
    let ambient = complete(all.ambient());
    all.set_bounding(bounding)
        .set_effective(effective)
        .set_permitted(permitted)
        .set_inheritable(inheritable)
        .set_ambient(ambient);
    process.set_capabilities(Some(all));
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
/// What goes wrong shows when the process cannot enter it.
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
