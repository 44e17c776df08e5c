//! Root file systems: disks are mounted once each and stacked with overlayfs.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use supermachine_protocol::{OverlayRootfs, Rootfs, SingleDisk, is_disk_serial, rootfs};

use crate::error::Error;
use crate::platform::{Disk, Platform};

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
    /// What is mounted for it, in order, layers aside.
    mounts: Vec<PathBuf>,
    layers: Vec<String>,
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
            mounts: Vec::new(),
            layers: Vec::new(),
        };
        let result = match &rootfs.kind {
            Some(rootfs::Kind::Overlay(overlay)) => {
                self.overlay(platform, overlay, directory, &mut made).await
            }
            Some(rootfs::Kind::SingleDisk(disk)) => single(platform, disk, &mut made).await,
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
        directory: &Path,
        made: &mut Assembled,
    ) -> Result<(), Error> {
        if overlay.lower_disks.is_empty() {
            return Err(Error::invalid("rootfs.overlay", "it has no lower disk"));
        }
        let mut lowers = Vec::with_capacity(overlay.lower_disks.len());
        for serial in &overlay.lower_disks {
            let disk = find(platform, serial).await?;
            lowers.push(self.mount_layer(serial, &disk, made)?);
        }
        create(&made.path)?;
        if overlay.writable_disk.is_empty() && overlay.read_only && lowers.len() == 1 {
            // Overlayfs wants two layers where nothing is writable.
            return made.mount(
                Some(&lowers[0]),
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
            options.push_str(&lower.to_string_lossy());
        }
        if !(overlay.read_only && overlay.writable_disk.is_empty()) {
            let writable = directory.join("writable");
            create(&writable)?;
            let root = std::mem::replace(&mut made.path, writable.clone());
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
            for part in ["upper", "work"] {
                create(&writable.join(part))?;
            }
            let writable = writable.display();
            options.push_str(&format!(
                ",upperdir={writable}/upper,workdir={writable}/work"
            ));
        }
        let flags = if overlay.read_only {
            MsFlags::MS_RDONLY
        } else {
            MsFlags::empty()
        };
        made.mount(Some(Path::new("overlay")), Some("overlay"), flags, &options)
    }

    fn mount_layer(
        &self,
        serial: &str,
        disk: &Disk,
        made: &mut Assembled,
    ) -> Result<PathBuf, Error> {
        let target = self.directory.join(serial);
        let mut users = self.users();
        if !users.contains_key(serial) {
            create(&target)?;
            let mut layer = Assembled {
                path: target.clone(),
                mounts: vec![],
                layers: vec![],
            };
            layer.mount_disk(disk, "erofs", MsFlags::MS_RDONLY)?;
        }
        *users.entry(serial.to_owned()).or_insert(0) += 1;
        made.layers.push(serial.to_owned());
        Ok(target)
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
    made.mount_disk(&disk, &single.fstype, flags)
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
