//! VMs without containers, in processes of the shim's program: booted, or restored.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use supermachine_tests::initramfs::Initramfs;
use supermachine_tests::shim::new_id;
use supermachine_vmm::VmConfig;
use supermachine_vmm::control::{
    BootSpec, ConsoleSpec, DiskSpec, Event, Exit, PortSpec, RestoreSpec, SpawnConfig, VmHandle,
};

use crate::bad;
use crate::support::{World, equal};

/// What a guest may take for anything, on an emulated machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

/// A kernel's command line, with what the guest is to do.
pub(crate) fn command_line(guest: &str) -> String {
    let serial = VmConfig::SERIAL;
    format!("console={serial} quiet reboot=t panic=-1 {guest}")
}

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
            cmdline: command_line(""),
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
            exe: bad::vmm()?,
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

/// A guest that does what it is told on a console port.
pub(crate) struct Told {
    pub(crate) machine: Machine,
    port: BufReader<UnixStream>,
}

impl Told {
    /// Boots one whose program does the commands of `GUEST=what`.
    pub(crate) fn boot(
        world: &World,
        what: &str,
        change: impl FnOnce(&mut BootSpec),
    ) -> Result<Self> {
        let ours = std::env::current_exe().context("find this program")?;
        let archive = world.files()?.join("guest.cpio");
        let init = Initramfs::of_program(&ours.with_file_name("guest"))?;
        std::fs::write(&archive, init.finish()).context("write an initramfs")?;
        let machine = Machine::boot(world, &archive, |spec| {
            spec.cmdline = command_line(&format!("GUEST={what}"));
            spec.console = Some(ConsoleSpec {
                ports: vec!["commands".to_owned()],
                max_ports: 1,
            });
            change(spec);
        })?;
        let (port, far) = port()?;
        let (input, output) = (far.try_clone()?, far);
        machine.vm.attach_port(0, Some(input), Some(output))?;
        machine.opened()?;
        Ok(Self { machine, port })
    }

    /// One that goes on from a snapshot, with these disks.
    pub(crate) fn restore(world: &World, snapshot: &Path, disks: Vec<DiskSpec>) -> Result<Self> {
        let (port, far) = port()?;
        let output = far.try_clone()?;
        let machine = Machine::restore(world, snapshot, |spec| {
            spec.disks = disks;
            spec.max_ports = 1;
            spec.ports = vec![PortSpec {
                port: 0,
                input: Some(far),
                output: Some(output),
            }];
        })?;
        Ok(Self { machine, port })
    }

    /// Has the guest do something; its answer.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.port.get_mut(), "{command}").context("tell the guest")?;
        let mut answer = String::new();
        let read = self.port.read_line(&mut answer);
        let said = || self.machine.said();
        match read.with_context(|| format!("{command}: {}", said()))? {
            0 => bail!("the guest ended at {command}: {}", said()),
            _ => Ok(answer.trim().to_owned()),
        }
    }
}

/// Both ends of a port: ours, on which nothing is waited for longer than [`DEADLINE`].
fn port() -> Result<(BufReader<UnixStream>, OwnedFd)> {
    let (port, far) = UnixStream::pair().context("no sockets")?;
    port.set_read_timeout(Some(DEADLINE))?;
    Ok((BufReader::new(port), far.into()))
}
