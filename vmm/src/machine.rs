//! Assembly and life cycle of a VM.

mod assembly;
mod board;
mod devices;
mod reactors;
mod restore;
mod run;
mod save;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::config::VmConfig;
use crate::devices::virtio::block::FillError;
use crate::devices::virtio::{balloon, console};
use crate::error::{Error, PauseError, SaveError};
use crate::exit::Exit;
use crate::hypervisor::{Ahead, Host, Hypervisor, HypervisorError};
use crate::snapshot::{Id, SnapshotFile, SnapshotTarget};
use assembly::Assembly;
pub use restore::RestoreConfig;
use run::Running;
pub(crate) use save::MachineState;

/// A VM that is built and has not run.
pub struct Vm {
    assembly: Assembly<<Host as Hypervisor>::Vm>,
}

/// A VM whose vCPUs run. Dropping it stops it.
#[derive(Clone)]
pub struct RunningVm {
    running: Arc<Running>,
}

impl Vm {
    /// Builds the VM: memory, kernel, firmware tables, devices, vCPUs.
    ///
    /// # Errors
    /// One variant of [`Error`] for each way this can fail.
    pub fn new(config: VmConfig) -> Result<Self, Error> {
        Self::on(Ahead::open(), config)
    }

    /// Builds the VM on a hypervisor that was opened before.
    pub(crate) fn on(
        hypervisor: Result<Ahead<Host>, HypervisorError>,
        config: VmConfig,
    ) -> Result<Self, Error> {
        // The image first: a bad one is told whatever the host is.
        let kernel = assembly::check(&config)?;
        let hypervisor = hypervisor?;
        Ok(Self {
            assembly: Assembly::new(&hypervisor, config, &kernel)?,
        })
    }

    /// Builds a VM that goes on from a snapshot. Any number can, from the same files, at once.
    ///
    /// # Errors
    /// Whatever is wrong with the files, whatever this host can't give, and what doesn't fit.
    pub fn restore(config: RestoreConfig) -> Result<Self, Error> {
        Self::restore_on(Ahead::open(), config)
    }

    /// Builds it on a hypervisor that was opened before.
    pub(crate) fn restore_on(
        hypervisor: Result<Ahead<Host>, HypervisorError>,
        config: RestoreConfig,
    ) -> Result<Self, Error> {
        Ok(Self {
            assembly: Assembly::restore(&hypervisor?, config)?,
        })
    }

    /// Starts the vCPUs, each on a thread of its own.
    ///
    /// # Errors
    /// When a thread or the first state of a vCPU is refused; nothing runs then.
    pub fn start(self) -> Result<RunningVm, Error> {
        Ok(RunningVm {
            running: Arc::new(self.assembly.start()?),
        })
    }
}

impl RunningVm {
    /// The console's ports, if it has a console.
    pub fn console(&self) -> Option<console::Handle> {
        self.running.handles.console.clone()
    }

    /// The balloon, if it has one.
    pub fn balloon(&self) -> Option<balloon::Handle> {
        self.running.handles.balloon.clone()
    }

    /// Stops all vCPUs outside of the guest, with nothing of their last exits left to be completed,
    /// and returns when they have stopped; a VM that is paused already stays so. Devices go on, as
    /// far as the guest has left them work: what the host sends waits in their queues and then in
    /// front of them.
    ///
    /// # Errors
    /// [`PauseError::Busy`] when a vCPU has not come out within `limit`: then all go on.
    pub fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        self.running.pause(limit)
    }

    /// Lets the vCPUs of a paused VM go on, and tells the guest's watchdogs.
    pub fn resume(&self) {
        self.running.resume();
    }

    /// Gives a disk that has been empty, one of no sectors, what it has from now on: a raw image or
    /// a block device; several, if the guest may not write, follow each other. The guest is told of
    /// the capacity and sees the disk. Disks count from 0, in the order of the configuration.
    ///
    /// # Errors
    /// There is no such disk, it isn't empty, or the files are no disk's or have nothing in them;
    /// the VM has ended. Otherwise it goes on without.
    pub fn fill_disk(&self, disk: usize, files: Vec<File>) -> Result<(), FillError> {
        self.running.fill_disk(disk, files)
    }

    /// Writes a paused VM to `dir`, under the name that [`SnapshotTarget::path_in`] tells, in place
    /// of an older one; answers where that is. With the files of `base`, a full snapshot and diffs
    /// on it, it has only the pages of memory that are not the same there. Disks are not of it.
    ///
    /// # Errors
    /// A VM that isn't paused or has ended, and what the host refused. The VM goes on all the same.
    pub fn snapshot(
        &self,
        dir: &Path,
        base: Option<&[SnapshotFile]>,
    ) -> Result<PathBuf, SaveError> {
        let target = SnapshotTarget::create(dir)?;
        self.running.save(target.file(), base)?;
        Ok(target.commit()?)
    }

    /// Writes a paused VM to a file of the caller's; see [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// As there.
    pub fn snapshot_to(&self, file: &File, base: Option<&[SnapshotFile]>) -> Result<Id, SaveError> {
        self.running.save(file, base)
    }

    /// Has `tell` called once it is decided that the VM ends: now, if it is, or by the thread that
    /// decides it. Then [`wait`](Self::wait) doesn't take long. It replaces one that was given before.
    pub(crate) fn on_end(&self, tell: impl FnOnce() + Send + 'static) {
        self.running.on_end(Box::new(tell));
    }

    /// Waits until the VM has ended: all vCPUs and devices have stopped.
    pub fn wait(&self) -> Exit {
        self.running.wait()
    }

    /// Ends the VM, as [`Exit::Stopped`] unless it has ended already; [`wait`](Self::wait) tells.
    pub fn stop(&self) {
        self.running.stop();
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").finish_non_exhaustive()
    }
}

impl fmt::Debug for RunningVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningVm").finish_non_exhaustive()
    }
}
