//! What a parent asks of a new VMM process and of the VM in it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::devices::virtio::balloon::BalloonConfig;
use crate::jail::Policy;

use super::message::{Boot, Console, Disk, FileIndex, LogLevel, Port, Restore, Vsock};

/// How to start the VMM process.
#[derive(Debug, Clone)]
pub struct SpawnConfig {
    /// The program: one whose `main` calls [`child::main`](crate::child::main) first.
    pub exe: PathBuf,
    /// Shown in the process list.
    pub name: String,
    /// The directories of its cgroups, one in each hierarchy. With cgroup v2 it is born there; else
    /// it is moved before it is asked for anything. Where that is refused there is a warning, and it
    /// stays in its parent's cgroup.
    pub cgroups: Vec<PathBuf>,
    /// The child logs this and what is more serious.
    pub log_level: LogLevel,
    /// How strictly the process is confined.
    pub jail: Policy,
    /// How many disks the VM will have. For each, up to 16, it gets an io_uring before it is confined;
    /// disks beyond do one request at a time.
    pub disks: usize,
}

impl SpawnConfig {
    /// This program, in this process's cgroup, quiet, confined as strictly as hosts in wide use
    /// allow, for up to four disks.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            exe: PathBuf::from("/proc/self/exe"),
            name: name.into(),
            cgroups: Vec::new(),
            log_level: LogLevel::Warn,
            jail: Policy::default(),
            disks: 4,
        }
    }
}

/// A VM to boot. The files are open: the child opens nothing itself.
#[derive(Debug)]
pub struct BootSpec {
    /// Number of processors, 1 or more.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// An ELF vmlinux or a bzImage.
    pub kernel: File,
    /// The initial file system.
    pub initramfs: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where what the guest writes to its serial port goes; dropped when absent.
    pub serial: Option<OwnedFd>,
    /// Block devices, in the guest's order.
    pub disks: Vec<DiskSpec>,
    /// A console device.
    pub console: Option<ConsoleSpec>,
    /// A vsock device.
    pub vsock: Option<VsockSpec>,
    /// How the guest gives memory back, if it does.
    pub balloon: Option<BalloonConfig>,
    /// An entropy device.
    pub rng: bool,
}

/// One block device.
#[derive(Debug)]
pub struct DiskSpec {
    /// A raw image or a block device, open for what `read_only` says; several, if that is true,
    /// follow each other as [`Concat`](crate::devices::virtio::block::Concat) has them.
    pub files: Vec<File>,
    /// Whether the guest is refused writes.
    pub read_only: bool,
    /// The device id the guest reads, at most 20 bytes.
    pub serial: String,
}

/// The console device.
#[derive(Debug)]
pub struct ConsoleSpec {
    /// Names of ports that exist from the start, from port 0.
    pub ports: Vec<String>,
    /// Ports the device has room for.
    pub max_ports: u32,
}

/// The vsock device.
#[derive(Debug)]
pub struct VsockSpec {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Where host programs ask for a connection into the guest.
    pub listener: UnixListener,
}

impl BootSpec {
    /// The message, and the files in the places it names.
    pub(super) fn to_message(&self) -> (Boot, Vec<BorrowedFd<'_>>) {
        let mut files = Files::default();
        let boot = Boot {
            vcpus: self.vcpus,
            memory: self.memory,
            kernel: files.add(&self.kernel),
            initramfs: self.initramfs.as_ref().map(|file| files.add(file)),
            cmdline: self.cmdline.clone(),
            serial: self.serial.as_ref().map(|file| files.add(file)),
            disks: files.disks(&self.disks),
            console: self.console.as_ref().map(|console| Console {
                ports: console.ports.clone(),
                max_ports: console.max_ports,
            }),
            vsock: files.vsock(self.vsock.as_ref()),
            balloon: self.balloon,
            rng: self.rng,
        };
        (boot, files.0)
    }
}

/// A VM that goes on from a snapshot, and what its devices are connected to now. Its shape is the
/// snapshot's.
#[derive(Debug)]
pub struct RestoreSpec {
    /// A full snapshot and the diffs on it, oldest first. The files must not get shorter while the
    /// VM lives.
    pub snapshot: Vec<File>,
    /// Whether to read all guest RAM first and compare its checksums, for files that aren't the
    /// host's own.
    pub verify_memory: bool,
    /// Where what the guest writes to its serial port goes; dropped when absent.
    pub serial: Option<OwnedFd>,
    /// The disks, as many as the snapshot has, in its order.
    pub disks: Vec<DiskSpec>,
    /// Ports the snapshot's console has room for; 0 if it has none. Events of others would be a
    /// broken rule.
    pub max_ports: u32,
    /// What ports are connected to. Those left out are closed to the guest.
    pub ports: Vec<PortSpec>,
    /// The vsock device, if the snapshot has one.
    pub vsock: Option<VsockSpec>,
}

/// What a console port is connected to.
#[derive(Debug)]
pub struct PortSpec {
    /// Its number, from 0.
    pub port: u32,
    /// What the guest reads.
    pub input: Option<OwnedFd>,
    /// What takes what it writes.
    pub output: Option<OwnedFd>,
}

impl RestoreSpec {
    /// Of a full snapshot, whose RAM is verified, with nothing connected.
    pub fn new(snapshot: File) -> Self {
        Self {
            snapshot: vec![snapshot],
            verify_memory: true,
            serial: None,
            disks: Vec::new(),
            max_ports: 0,
            ports: Vec::new(),
            vsock: None,
        }
    }

    /// The message, and the files in the places it names.
    pub(super) fn to_message(&self) -> (Restore, Vec<BorrowedFd<'_>>) {
        let mut files = Files::default();
        let restore = Restore {
            snapshot: self.snapshot.iter().map(|file| files.add(file)).collect(),
            verify_memory: self.verify_memory,
            serial: self.serial.as_ref().map(|file| files.add(file)),
            disks: files.disks(&self.disks),
            ports: self
                .ports
                .iter()
                .map(|port| Port {
                    port: port.port,
                    input: port.input.as_ref().map(|file| files.add(file)),
                    output: port.output.as_ref().map(|file| files.add(file)),
                })
                .collect(),
            vsock: files.vsock(self.vsock.as_ref()),
        };
        (restore, files.0)
    }
}

/// Files of a frame, in the order of their places.
#[derive(Debug, Default)]
pub(super) struct Files<'a>(pub(super) Vec<BorrowedFd<'a>>);

impl<'a> Files<'a> {
    pub(super) fn add(&mut self, file: &'a impl AsFd) -> FileIndex {
        self.0.push(file.as_fd());
        self.0.len() - 1
    }
    fn disks(&mut self, disks: &'a [DiskSpec]) -> Vec<Disk> {
        disks
            .iter()
            .map(|disk| Disk {
                files: disk.files.iter().map(|file| self.add(file)).collect(),
                read_only: disk.read_only,
                serial: disk.serial.clone(),
            })
            .collect()
    }

    fn vsock(&mut self, vsock: Option<&'a VsockSpec>) -> Option<Vsock> {
        vsock.map(|vsock| Vsock {
            cid: vsock.cid,
            listener: self.add(&vsock.listener),
        })
    }
}
