//! What the agent needs of the machine it runs on: console ports and disks.
//!
//! [`Guest`] is the real one. Tests bring their own, so that everything above runs on any Linux.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use nix::libc;
use supermachine_protocol::{AGENT_CONSOLE_NAME, Partition};

use crate::error::Error;
use crate::partition::check_bounds;
use crate::sys;
use crate::uevent::Uevents;

/// One end of a stream to the host; non-blocking.
#[derive(Debug)]
pub struct Port {
    /// Read for what the host sends, written for what it is to get.
    pub fd: OwnedFd,
    /// The stream is a virtio-console port, whose `read` returns 0 also before the host opened it.
    pub virtio: bool,
}

/// Where a disk's content is found.
#[derive(Debug, Clone)]
pub enum Disk {
    /// A block device.
    Device(PathBuf),
    /// A directory that stands for the mounted disk.
    Directory(PathBuf),
}

/// The machine's devices.
#[async_trait]
pub trait Platform: Send + Sync + 'static {
    /// Opens console port `port` for stdio.
    async fn open_port(&self, port: u32) -> Result<Port, Error>;

    /// Finds the disk with this serial, or the partition with this name.
    async fn find_disk(&self, serial: &str) -> Result<Disk, Error>;

    /// Makes these parts of the disk with this serial disks of their own.
    async fn partition(&self, serial: &str, partitions: &[&Partition]) -> Result<(), Error>;
}

/// The devices of a supermachine guest.
#[derive(Debug)]
pub(crate) struct Guest {
    uevents: Uevents,
    /// "/dev/vport0p": the ports of the console device, before their number.
    ports: String,
    /// Devices by serial, each read once as that is a request to the device; partitions by name.
    disks: Mutex<HashMap<String, String>>,
}

impl Guest {
    /// Finds the console device, and the path of the agent's own port.
    pub(crate) async fn find(uevents: Uevents) -> Result<(Self, PathBuf), Error> {
        let device = uevents
            .find(find_console)
            .await
            .ok_or_else(|| Error::not_found("console port", AGENT_CONSOLE_NAME))?;
        let ports = device
            .trim_end_matches(|c: char| c.is_ascii_digit())
            .to_owned();
        Ok((
            Self {
                uevents,
                ports,
                disks: Mutex::default(),
            },
            PathBuf::from(device),
        ))
    }

    fn lookup_disk(&self, serial: &str) -> Option<PathBuf> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if !disks.contains_key(serial) {
            for entry in fs::read_dir("/sys/block").ok()?.flatten() {
                let name = entry.file_name();
                let Some(name) = name.to_str().filter(|name| name.starts_with("vd")) else {
                    continue;
                };
                if disks.values().any(|known| known == name) {
                    continue;
                }
                if let Ok(found) = fs::read_to_string(entry.path().join("serial")) {
                    disks.insert(found.trim_end().to_owned(), name.to_owned());
                }
            }
        }
        let device = Path::new("/dev").join(disks.get(serial)?);
        device.exists().then_some(device)
    }
}

#[async_trait]
impl Platform for Guest {
    async fn open_port(&self, port: u32) -> Result<Port, Error> {
        let path = PathBuf::from(format!("{}{port}", self.ports));
        self.uevents
            .find(|| path.exists().then_some(()))
            .await
            .ok_or_else(|| Error::not_found("console port", port.to_string()))?;
        Ok(Port {
            fd: open(&path)?,
            virtio: true,
        })
    }

    async fn find_disk(&self, serial: &str) -> Result<Disk, Error> {
        self.uevents
            .find(|| self.lookup_disk(serial))
            .await
            .map(Disk::Device)
            .ok_or_else(|| Error::not_found("disk", serial))
    }

    async fn partition(&self, serial: &str, partitions: &[&Partition]) -> Result<(), Error> {
        let find = || self.lookup_disk(serial);
        let device = self.uevents.find(find).await;
        let device = device.ok_or_else(|| Error::not_found("disk", serial))?;
        let disk = fs::File::open(&device).map_err(Error::file("open", &device))?;
        let size = sys::partition::device_size(&disk).map_err(Error::file("measure", &device))?;
        let name = device.file_name().unwrap_or_default().to_string_lossy();
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, partition) in (1_u32..).zip(partitions) {
            check_bounds(partition, size)?;
            if disks.contains_key(&partition.name) {
                let name = partition.name.clone();
                return Err(Error::Exists { kind: "disk", name });
            }
            sys::partition::add(&disk, number, partition.offset, partition.length)
                .map_err(Error::file("partition", &device))?;
            disks.insert(partition.name.clone(), format!("{name}{number}"));
        }
        Ok(())
    }
}

/// The device file of the port named [`AGENT_CONSOLE_NAME`].
fn find_console() -> Option<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == AGENT_CONSOLE_NAME {
            let device = format!("/dev/{}", entry.file_name().to_str()?);
            return Path::new(&device).exists().then_some(device);
        }
    }
    None
}

/// Opens a port's device file; the host is told at once.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => {
                Error::State(format!("Console port {} is still in use", path.display()))
            }
            _ => Error::file("open", path)(source),
        })
}
