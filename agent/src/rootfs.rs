//! Root file systems: disks are mounted once each and stacked with overlayfs.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, chdir, chown};
use supermachine_protocol::{Directory, OverlayRootfs, Rootfs, SingleDisk, is_disk_serial, rootfs};

use crate::changes::Changes;
use crate::error::Error;
use crate::partition;
use crate::platform::{Disk, Platform};

/// What is in an upper directory is there as a whole, whatever the kernel's defaults: a changed file
/// with its data, a renamed directory with its content, all names without an index.
const WHOLE_INODES: &str = ",metacopy=off,redirect_dir=off,index=off";

/// Mounted layers, shared by all containers that name the same disk.
#[derive(Debug)]
pub(crate) struct Layers {
    directory: PathBuf,
    users: Mutex<HashMap<String, usize>>,
}

/// A container's assembled root. [`Assembled::remove`] takes it apart.
#[derive(Debug)]
pub(crate) struct Assembled {
    /// Where the container's root is.
    pub(crate) path: PathBuf,
    /// What is written to it; none if that can't be kept.
    pub(crate) changes: Option<Changes>,
    /// What is mounted for it, in order, layers aside.
    mounts: Vec<PathBuf>,
    layers: Vec<String>,
    /// Where a disk is mounted that outlives the machine with what is written to it.
    pub(crate) keeps: Option<PathBuf>,
}

impl Layers {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            users: Mutex::default(),
        }
    }

    /// Assembles `rootfs` beneath `directory`, which exists and is the container's own.
    pub(crate) async fn assemble(
        &self,
        platform: &dyn Platform,
        rootfs: &Rootfs,
        directory: &Path,
    ) -> Result<Assembled, Error> {
        let mut made = Assembled {
            path: directory.join("rootfs"),
            changes: None,
            mounts: Vec::new(),
            layers: Vec::new(),
            keeps: None,
        };
        for (disk, partitions) in partition::by_disk(&rootfs.partitions)? {
            platform.partition(disk, &partitions).await?;
        }
        let directories = &rootfs.directories;
        let result = match &rootfs.kind {
            Some(rootfs::Kind::Overlay(overlay)) => {
                let writable = directory.join("writable");
                self.overlay(platform, overlay, directories, &writable, &mut made)
                    .await
            }
            Some(rootfs::Kind::SingleDisk(disk)) => {
                single(platform, disk, directories, directory, &mut made).await
            }
            Some(_) | None => Err(Error::invalid("rootfs", "its kind is missing or unknown")),
        };
        match result {
            Ok(()) => Ok(made),
            Err(error) => {
                self.remove(made);
                Err(error)
            }
        }
    }

    async fn overlay(
        &self,
        platform: &dyn Platform,
        overlay: &OverlayRootfs,
        directories: &[Directory],
        writable: &Path,
        made: &mut Assembled,
    ) -> Result<(), Error> {
        if overlay.lower_disks.is_empty() {
            return Err(Error::invalid("rootfs.overlay", "it has no lower disk"));
        }
        let mut lowers = Vec::with_capacity(overlay.lower_disks.len());
        for serial in &overlay.lower_disks {
            let disk = find(platform, serial).await?;
            self.mount_layer(serial, &disk, made)?;
            lowers.push(serial);
        }
        create(&made.path)?;
        if overlay.writable_disk.is_empty() && overlay.read_only && lowers.len() == 1 {
            // Overlayfs wants two layers where nothing is writable.
            return made.mount(
                Some(&self.directory.join(lowers[0])),
                None,
                MsFlags::MS_BIND | MsFlags::MS_RDONLY,
                "",
            );
        }
        let mut options = String::from("lowerdir=");
        for (index, lower) in lowers.iter().enumerate() {
            if index > 0 {
                options.push(':');
            }
            options.push_str(lower);
        }
        if !(overlay.read_only && overlay.writable_disk.is_empty()) {
            create(writable)?;
            let root = std::mem::replace(&mut made.path, writable.to_path_buf());
            let mounted = if overlay.writable_disk.is_empty() {
                made.mount(
                    Some(Path::new("tmpfs")),
                    Some("tmpfs"),
                    MsFlags::empty(),
                    "mode=0755",
                )
            } else {
                let disk = find(platform, &overlay.writable_disk).await?;
                made.mount_disk(&disk, "ext4", MsFlags::MS_NOATIME)
            };
            made.path = root;
            mounted?;
            made.keeps = (!overlay.upper.is_empty()).then(|| writable.to_path_buf());
            make_directories(writable, directories)?;
            let mut upper = PathBuf::new();
            for (option, part, usual) in [
                ("upperdir", &overlay.upper, "upper"),
                ("workdir", &overlay.work, "work"),
            ] {
                let part = if part.is_empty() { usual } else { part };
                let path = writable.join(inside(part)?);
                create(&path)?;
                options.push_str(&format!(",{option}={}", path.display()));
                if option == "upperdir" {
                    upper = path;
                }
            }
            options.push_str(WHOLE_INODES);
            if !overlay.writable_disk.is_empty() {
                let (own, below) = lowers.split_at(usize::from(overlay.own_lower_disk));
                let layer = |serial: &&String| self.directory.join(serial);
                let own = own.first().map(layer);
                let begun = Changes::begin(upper.clone(), own, below.iter().map(layer).collect());
                made.changes = Some(begun.map_err(Error::file("prepare", upper))?);
            }
        }
        let flags = if overlay.read_only {
            MsFlags::MS_RDONLY
        } else {
            MsFlags::empty()
        };
        // All options must fit into a page, which the layers' full paths would not: their names are
        // looked up from where they lie, by a thread that has a working directory of its own.
        std::thread::scope(|scope| {
            let mounting = scope.spawn(|| {
                unshare(CloneFlags::CLONE_FS).map_err(Error::system("leave the root"))?;
                chdir(&self.directory).map_err(Error::file("enter", &self.directory))?;
                made.mount(Some(Path::new("overlay")), Some("overlay"), flags, &options)
            });
            mounting
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn mount_layer(&self, serial: &str, disk: &Disk, made: &mut Assembled) -> Result<(), Error> {
        let target = self.directory.join(serial);
        let mut users = self.users();
        if !users.contains_key(serial) {
            create(&target)?;
            let mut layer = Assembled {
                path: target.clone(),
                changes: None,
                mounts: vec![],
                layers: vec![],
                keeps: None,
            };
            layer.mount_disk(disk, "erofs", MsFlags::MS_RDONLY)?;
        }
        *users.entry(serial.to_owned()).or_insert(0) += 1;
        made.layers.push(serial.to_owned());
        Ok(())
    }

    /// Unmounts what was assembled. Errors are logged: the caller can do nothing about them.
    pub(crate) fn remove(&self, made: Assembled) {
        for path in made.mounts.iter().rev() {
            unmount(path);
        }
        let mut users = self.users();
        for serial in &made.layers {
            let Some(count) = users.get_mut(serial) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                users.remove(serial);
                let target = self.directory.join(serial);
                unmount(&target);
                let _ = fs::remove_dir(target);
            }
        }
    }

    fn users(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Assembled {
    /// Mounts at `self.path`.
    fn mount(
        &mut self,
        source: Option<&Path>,
        fstype: Option<&str>,
        flags: MsFlags,
        options: &str,
    ) -> Result<(), Error> {
        mount(source, &self.path, fstype, flags, Some(options))
            .map_err(Error::file("mount", source.unwrap_or(&self.path)))?;
        self.mounts.push(self.path.clone());
        Ok(())
    }

    fn mount_disk(&mut self, disk: &Disk, fstype: &str, flags: MsFlags) -> Result<(), Error> {
        match disk {
            Disk::Device(device) => self.mount(Some(device), Some(fstype), flags, ""),
            Disk::Directory(path) => self.mount(Some(path), None, MsFlags::MS_BIND, ""),
        }
    }
}

async fn single(
    platform: &dyn Platform,
    single: &SingleDisk,
    directories: &[Directory],
    directory: &Path,
    made: &mut Assembled,
) -> Result<(), Error> {
    if !matches!(single.fstype.as_str(), "ext4" | "erofs") {
        let reason = format!("{:?} is not \"ext4\" or \"erofs\"", single.fstype);
        return Err(Error::invalid("rootfs.single_disk.fstype", reason));
    }
    let disk = find(platform, &single.serial).await?;
    create(&made.path)?;
    let flags = if single.read_only {
        MsFlags::MS_RDONLY
    } else {
        MsFlags::MS_NOATIME
    };
    if single.directory.is_empty() {
        made.mount_disk(&disk, &single.fstype, flags)?;
        made.keeps = (!single.read_only).then(|| made.path.clone());
        return make_directories(&made.path, directories);
    }
    let whole = directory.join("disk");
    create(&whole)?;
    let root = std::mem::replace(&mut made.path, whole.clone());
    let mounted = made.mount_disk(&disk, &single.fstype, flags);
    made.path = root;
    mounted?;
    made.keeps = (!single.read_only).then(|| whole.clone());
    make_directories(&whole, directories)?;
    let part = whole.join(inside(&single.directory)?);
    made.mount(Some(&part), None, MsFlags::MS_BIND, "")
}

/// Makes those that are missing below `root`. Nobody else has it mounted yet, and containers never
/// get above the directory that is their root.
fn make_directories(root: &Path, directories: &[Directory]) -> Result<(), Error> {
    for directory in directories {
        let path = root.join(inside(&directory.path)?);
        if path.is_dir() {
            continue;
        }
        fs::create_dir(&path).map_err(Error::file("create", &path))?;
        let (owner, group) = (Uid::from_raw(directory.uid), Gid::from_raw(directory.gid));
        chown(&path, Some(owner), Some(group)).map_err(Error::file("give away", &path))?;
        let mode = fs::Permissions::from_mode(directory.mode & 0o7777);
        fs::set_permissions(&path, mode).map_err(Error::file("open up", &path))?;
    }
    Ok(())
}

/// A path that leads below where it is looked up; overlayfs's options have no room for the rest.
fn inside(path: &str) -> Result<&Path, Error> {
    let relative = Path::new(path);
    let plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if path.is_empty() || !plain || path.contains([',', ':', '\\']) {
        let reason = format!("{path:?} is not a plain relative path");
        return Err(Error::invalid("rootfs directory", reason));
    }
    Ok(relative)
}

async fn find(platform: &dyn Platform, serial: &str) -> Result<Disk, Error> {
    if !is_disk_serial(serial) {
        return Err(Error::invalid(
            "disk serial",
            format!("{serial:?} cannot be one"),
        ));
    }
    platform.find_disk(serial).await
}

fn create(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(Error::file("create", path))
}

fn unmount(path: &Path) {
    // Lazily: what a container leaves open must not keep its sandbox from going.
    if let Err(error) = umount2(path, MntFlags::MNT_DETACH) {
        tracing::warn!(path = %path.display(), %error, "cannot unmount");
    }
}
