//! Memory that goes back to the host, as the host sees it: the resident size of the VMM's process
//! while a Linux guest uses memory and doesn't.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use supermachine_tests::initramfs::Initramfs;
use supermachine_tests::until;
use supermachine_vmm::control::{BootSpec, ConsoleSpec, Event, Exit, SpawnConfig, VmHandle};
use supermachine_vmm::devices::virtio::balloon::BalloonConfig;

use crate::bad;
use crate::support::{World, equal};

const MIB: u64 = 1 << 20;
/// What a guest may take for anything, on an emulated machine.
const DEADLINE: Duration = Duration::from_secs(90);

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("balloon::free_memory_goes_back", reporting),
        world.vm_test("balloon::inflated_and_deflated", inflated),
        world.vm_test("balloon::gives_way_at_oom", oom),
    ]
}

/// Without a target: the guest reports what it doesn't use.
fn reporting(world: &World) -> Result<()> {
    let mut guest = MemoryGuest::boot(world, 1024, BalloonConfig::default())?;
    let before = guest.resident()?;
    equal(guest.ask("fill 512")?.as_str(), "filled")?;
    let filled = guest.resident()?;
    ensure!(
        filled >= before + 500 * MIB,
        "resident {} MiB, then {} MiB with 512 more",
        before / MIB,
        filled / MIB
    );
    equal(guest.ask("free")?.as_str(), "freed")?;
    // Nothing announces it; the guest reports every two seconds.
    let enough = filled - 512 * MIB * 9 / 10;
    until("nine tenths of it to be back", DEADLINE, || {
        Ok(guest.resident()? <= enough)
    })?;
    let stats = guest.vm.balloon_stats()?;
    equal((stats.target, stats.actual, stats.refused_pages), (0, 0, 0))?;
    ensure!(stats.discarded >= 512 * MIB * 9 / 10, "{stats:?}");
    guest.end()
}

/// With a target, and nothing reported.
fn inflated(world: &World) -> Result<()> {
    const MEMORY: u64 = 512;
    let config = BalloonConfig {
        page_reporting: false,
        ..BalloonConfig::default()
    };
    let mut guest = MemoryGuest::boot(world, MEMORY, config)?;
    // Some that stays, and nearly all of the rest, once.
    equal(guest.ask("fill 64")?.as_str(), "filled")?;
    equal(guest.ask("fill 320")?.as_str(), "filled")?;
    equal(guest.ask("drop")?.as_str(), "dropped")?;
    let before = guest.resident()?;
    let target = 256 * MIB;
    guest.vm.set_balloon(target)?;
    guest.vm.await_balloon(DEADLINE)?;
    let after = guest.resident()?;
    // The guest may first take pages that the host never had to give.
    let untouched = (MEMORY * MIB).saturating_sub(before);
    let dropped = before.saturating_sub(after);
    ensure!(
        dropped + untouched >= target && dropped >= target * 3 / 4,
        "resident {} MiB, then {} MiB, with {} MiB untouched before",
        before / MIB,
        after / MIB,
        untouched / MIB
    );
    equal(guest.ask("check")?.as_str(), "intact")?;

    guest.vm.set_balloon(0)?;
    guest.vm.await_balloon(DEADLINE)?;
    equal(guest.ask("fill 256")?.as_str(), "filled")?;
    equal(guest.ask("check")?.as_str(), "intact")?;
    let stats = guest.vm.balloon_stats()?;
    equal((stats.actual, stats.refused_pages), (0, 0))?;
    guest.end()
}

/// A guest that needs what is in the balloon takes it, and kills nobody.
fn oom(world: &World) -> Result<()> {
    let mut guest = MemoryGuest::boot(world, 512, BalloonConfig::default())?;
    let target = 320 * MIB;
    guest.vm.set_balloon(target)?;
    guest.vm.await_balloon(DEADLINE)?;
    equal(guest.ask("fill 256")?.as_str(), "filled")?;
    equal(guest.ask("check")?.as_str(), "intact")?;
    equal(guest.ask("ooms")?.as_str(), "0")?;
    let stats = guest.vm.balloon_stats()?;
    ensure!(
        stats.target == target && stats.actual < target,
        "the balloon has not given way: {stats:?}"
    );
    guest.end()
}

/// A VM whose guest uses memory as it is told.
struct MemoryGuest {
    vm: VmHandle,
    port: BufReader<UnixStream>,
    events: Receiver<Event>,
    log: PathBuf,
}

impl MemoryGuest {
    fn boot(world: &World, mebibytes: u64, balloon: BalloonConfig) -> Result<Self> {
        let files = world.files()?;
        let ours = std::env::current_exe().context("find this program")?;
        let archive = files.join("guest.cpio");
        let init = Initramfs::of_program(&ours.with_file_name("guest"))?;
        std::fs::write(&archive, init.finish()).context("write an initramfs")?;
        let log = files.join("guest.log");
        let spec = BootSpec {
            vcpus: 1,
            memory: mebibytes << 20,
            kernel: File::open(bad::kernel()?).context("open the kernel")?,
            initramfs: Some(File::open(&archive)?),
            cmdline: format!(
                "console={} quiet panic=-1 reboot=t GUEST=memory",
                supermachine_vmm::VmConfig::SERIAL
            ),
            serial: Some(File::create(&log)?.into()),
            disks: Vec::new(),
            console: Some(ConsoleSpec {
                ports: vec!["commands".to_owned()],
                max_ports: 1,
            }),
            vsock: None,
            balloon: Some(balloon),
            rng: false,
        };
        let (sender, events) = mpsc::channel();
        let config = SpawnConfig {
            exe: world.shim()?.program,
            ..SpawnConfig::new("balloon")
        };
        let vm = VmHandle::spawn(config, Box::new(move |event| drop(sender.send(event))))?;
        vm.boot(&spec, DEADLINE)?;
        let (port, far) = UnixStream::pair().context("no sockets")?;
        port.set_read_timeout(Some(DEADLINE))?;
        let (input, output) = (OwnedFd::from(far.try_clone()?), OwnedFd::from(far));
        vm.attach_port(0, Some(input), Some(output))?;
        let guest = Self {
            vm,
            port: BufReader::new(port),
            events,
            log,
        };
        guest.opened()?;
        Ok(guest)
    }

    /// Waits until the guest's program has opened its port.
    fn opened(&self) -> Result<()> {
        loop {
            match self.events.recv_timeout(DEADLINE).context("no guest")? {
                Event::PortOpened { port: 0 } => return Ok(()),
                Event::Ended(exit) => bail!("the guest ended: {exit}: {}", self.said()),
                _ => {}
            }
        }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Has the guest do something; its answer.
    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.port.get_mut(), "{command}").context("tell the guest")?;
        let mut answer = String::new();
        let read = self.port.read_line(&mut answer);
        match read.with_context(|| format!("{command}: {}", self.said()))? {
            0 => bail!("the guest ended at {command}: {}", self.said()),
            _ => Ok(answer.trim().to_owned()),
        }
    }

    /// Bytes that the VMM's process has in memory, the guest's among them.
    fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.vm.pid()))
            .context("the VMM is gone")?;
        let kibibytes = status.lines().find_map(|line| {
            let value = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            value.parse::<u64>().ok()
        });
        Ok(kibibytes.context("the VMM has no memory")? << 10)
    }

    fn end(self) -> Result<()> {
        equal(self.vm.stop(DEADLINE), Exit::Stopped)
    }
}
