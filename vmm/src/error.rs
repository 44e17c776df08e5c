//! Why a VM did not start.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::arch::{KernelError, LoadError};
use crate::devices::bus::BadWindow;
use crate::devices::virtio::{QuiesceError, StateError};
use crate::hypervisor::HypervisorError;
use crate::memory::MemoryError;
use crate::snapshot::SnapshotError;

/// Why a VM did not start. Sources say the rest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no kernel image.
    #[error("Kernel image {path} does not exist")]
    KernelMissing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The kernel image cannot be opened.
    #[error("Cannot open kernel image {path}")]
    KernelOpen {
        /// Its path.
        path: PathBuf,
        /// What `open` answered.
        source: io::Error,
    },
    /// The kernel image is not one this VM can boot.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Kernel, initramfs or command line do not fit.
    #[error(transparent)]
    Load(LoadError),
    /// The hypervisor is absent, forbidden, lacking, or refused something.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The number of vCPUs is out of range.
    #[error("A VM cannot have {asked} vCPUs, expected 1 to {max}")]
    Vcpus {
        /// The number asked for.
        asked: u32,
        /// The most there can be here.
        max: u32,
    },
    /// The amount of memory is out of range.
    #[error(
        "A VM cannot have {asked} bytes of memory, expected a multiple of {step} from {min} on"
    )]
    MemorySize {
        /// Bytes asked for.
        asked: u64,
        /// What they must be a multiple of.
        step: u64,
        /// The least.
        min: u64,
    },
    /// Guest RAM could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There are more devices than the guest's address space has windows for.
    #[error("A VM cannot have {asked} virtio devices, expected at most {max}")]
    TooManyDevices {
        /// The number asked for.
        asked: usize,
        /// The most there can be.
        max: u32,
    },
    /// A device could not be made.
    #[error("Cannot make device {device}")]
    Device {
        /// Its id.
        device: String,
        /// What failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Two devices claim the same addresses.
    #[error(transparent)]
    Window(#[from] BadWindow),
    /// A thread could not be started.
    #[error("Cannot start thread {name}")]
    Thread {
        /// Its name.
        name: String,
        /// What failed.
        source: io::Error,
    },
    /// The host has no entropy.
    #[error("Cannot read random bytes from the host")]
    Entropy(#[source] io::Error),
    /// The snapshot that it was to go on from.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A device can't become what the snapshot has.
    #[error("Cannot restore device {device}")]
    Restore {
        /// Its id.
        device: String,
        /// What can't be.
        source: StateError,
    },
    /// What a VM is to go on with does not fit its snapshot.
    #[error("Snapshot has {has}, and {given} was given to restore it with")]
    Mismatch {
        /// What the snapshot has.
        has: String,
        /// What was given.
        given: String,
    },
}

/// Why a VM was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its vCPUs run: memory would change under the snapshot.
    #[error("The VM is not paused")]
    Running,
    /// There is nothing left to save.
    #[error("The VM has ended")]
    Ended,
    /// A device did not come to rest.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// The hypervisor refused to tell.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// It could not be written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl From<LoadError> for Error {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Kernel(error) => Self::Kernel(error),
            error => Self::Load(error),
        }
    }
}

/// Why a VM did not pause.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// There is nothing left to pause.
    #[error("The VM has ended")]
    Ended,
    /// vCPUs stayed in the guest or in a device.
    #[error("{inside} vCPUs did not come out of the guest within {limit:?}")]
    Busy {
        /// How many.
        inside: usize,
        /// How long they had.
        limit: Duration,
    },
}
