//! What a VM is made of.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use crate::devices::virtio::FaultObserver;
use crate::devices::virtio::balloon::BalloonConfig;
use crate::devices::virtio::console::ConsoleConfig;
use crate::devices::virtio::vsock::VsockConfig;
use crate::error::Error;
use crate::sys::ring::Rings;

/// A VM to build. Files are open already: the VMM opens nothing by name but the hypervisor.
pub struct VmConfig {
    /// vCPUs, 1 to 254 and what the hypervisor allows.
    pub vcpus: u32,
    /// Guest RAM in bytes, a multiple of 4096 on x86_64 and of 64 KiB on arm64.
    pub memory: u64,
    /// An ELF vmlinux or a bzImage on x86_64, an Image on arm64.
    pub kernel: File,
    /// An initramfs.
    pub initramfs: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the kernel's log on the serial port goes; without it there is none. Linux calls the port
    /// [`SERIAL`](Self::SERIAL).
    pub serial: Option<OwnedFd>,
    /// Block devices, `/dev/vda` first.
    pub disks: Vec<DiskConfig>,
    /// A console whose ports are the guest's streams.
    pub console: Option<ConsoleConfig>,
    /// A socket into the guest.
    pub vsock: Option<VsockConfig>,
    /// How the guest gives memory back, if it does.
    pub balloon: Option<BalloonConfig>,
    /// Whether the guest is given entropy.
    pub rng: bool,
    /// Where disks get their rings.
    pub(crate) rings: Rings,
    /// Hears of each device that faults, by id and reason.
    pub on_device_fault: Option<Arc<FaultObserver>>,
}

/// A block device.
#[derive(Debug)]
pub struct DiskConfig {
    /// A raw image or a block device of the host; several, if the guest may not write, follow each
    /// other as [`Concat`](crate::devices::virtio::block::Concat) has them.
    pub files: Vec<File>,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// What the guest finds in `/sys/block/*/serial`; 20 bytes at most.
    pub serial: String,
}

impl VmConfig {
    /// What Linux calls the serial port, as `console=` wants it: COM1 on x86_64, a PL011 on arm64.
    pub const SERIAL: &str = if cfg!(target_arch = "aarch64") {
        "ttyAMA0"
    } else {
        "ttyS0"
    };

    /// One vCPU, 256 MiB and no devices.
    pub fn new(kernel: File) -> Self {
        Self {
            vcpus: 1,
            memory: 256 << 20,
            kernel,
            initramfs: None,
            cmdline: String::new(),
            serial: None,
            disks: Vec::new(),
            console: None,
            vsock: None,
            balloon: None,
            rng: false,
            rings: Rings::default(),
            on_device_fault: None,
        }
    }

    /// Opens a kernel image.
    ///
    /// # Errors
    /// [`Error::KernelMissing`] or [`Error::KernelOpen`], naming the path.
    pub fn open_kernel(path: &Path) -> Result<File, Error> {
        File::open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::KernelMissing { path: path.into() },
            _ => Error::KernelOpen {
                path: path.into(),
                source,
            },
        })
    }
}

impl fmt::Debug for VmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmConfig")
            .field("vcpus", &self.vcpus)
            .field("memory", &self.memory)
            .field("cmdline", &self.cmdline)
            .field("disks", &self.disks)
            .field("console", &self.console)
            .field("vsock", &self.vsock)
            .field("balloon", &self.balloon)
            .field("rng", &self.rng)
            .finish_non_exhaustive()
    }
}
