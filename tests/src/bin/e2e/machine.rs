//! VMs without containers, in processes of the shim's program: booted, or restored.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use supermachine_tests::shim::new_id;
use supermachine_vmm::control::{BootSpec, Event, Exit, RestoreSpec, SpawnConfig, VmHandle};

use crate::bad;
use crate::support::{World, equal};

/// What a guest may take for anything, on an emulated machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// A VM in a process of its own, and what it has said.
pub(crate) struct Machine {
    pub(crate) vm: VmHandle,
    events: Receiver<Event>,
    log: PathBuf,
}

impl Machine {
    /// Boots the installed kernel with `initramfs` on 512 MiB, with what `change` makes of that.
    pub(crate) fn boot(
        world: &World,
        initramfs: &Path,
        change: impl FnOnce(&mut BootSpec),
    ) -> Result<Self> {
        let machine = Self::spawn(world)?;
        let mut spec = BootSpec {
            vcpus: 1,
            memory: 512 << 20,
            kernel: File::open(bad::kernel()?).context("open the kernel")?,
            initramfs: Some(File::open(initramfs).context("open the initramfs")?),
            cmdline: COMMAND_LINE.to_owned(),
            serial: Some(machine.serial()?),
            disks: Vec::new(),
            console: None,
            vsock: None,
            balloon: None,
            rng: false,
        };
        change(&mut spec);
        machine.vm.boot(&spec, DEADLINE)?;
        Ok(machine)
    }

    /// Goes on from a snapshot, with what `change` connects it to.
    pub(crate) fn restore(
        world: &World,
        snapshot: &Path,
        change: impl FnOnce(&mut RestoreSpec),
    ) -> Result<Self> {
        let machine = Self::spawn(world)?;
        let mut spec = RestoreSpec::new(File::open(snapshot).context("open the snapshot")?);
        spec.serial = Some(machine.serial()?);
        change(&mut spec);
        machine.vm.restore(&spec, DEADLINE)?;
        Ok(machine)
    }

    fn spawn(world: &World) -> Result<Self> {
        let (sender, events) = mpsc::channel();
        let config = SpawnConfig {
            exe: world.shim()?.program,
            ..SpawnConfig::new("e2e")
        };
        // Refused only once nobody waits any more.
        let on_event = move |event| drop(sender.send(event));
        Ok(Self {
            vm: VmHandle::spawn(config, Box::new(on_event))?,
            events,
            log: world.files()?.join(format!("{}.log", new_id())),
        })
    }

    fn serial(&self) -> Result<OwnedFd> {
        Ok(File::create(&self.log)?.into())
    }

    /// Waits until the guest's program has opened port 0.
    pub(crate) fn opened(&self) -> Result<()> {
        loop {
            match self.events.recv_timeout(DEADLINE).context("no guest")? {
                Event::PortOpened { port: 0 } => return Ok(()),
                Event::Ended(exit) => bail!("the guest ended: {exit}: {}", self.said()),
                _ => {}
            }
        }
    }

    /// What it has said on the serial port.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Snapshots it to `dir`; it goes on.
    pub(crate) fn snapshot(&self, dir: &Path) -> Result<PathBuf> {
        self.vm.pause()?;
        let path = self.vm.snapshot(dir, &[], DEADLINE)?;
        self.vm.resume()?;
        Ok(path)
    }

    pub(crate) fn end(self) -> Result<()> {
        equal(self.vm.stop(DEADLINE), Exit::Stopped)
    }
}
