//! Memory that goes back to the host, as the host sees it: the resident size of the VMM's process
//! while a Linux guest uses memory and doesn't.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::until;
use supermachine_vmm::control::VmHandle;
use supermachine_vmm::devices::virtio::balloon::BalloonConfig;

use crate::machine::{DEADLINE, Told};
use crate::support::{World, equal};

const MIB: u64 = 1 << 20;

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
    let stats = guest.vm().balloon_stats()?;
    equal((stats.target, stats.actual, stats.refused_pages), (0, 0, 0))?;
    ensure!(stats.discarded >= 512 * MIB * 9 / 10, "{stats:?}");
    guest.end()
}

/// With a target, and nothing reported.
fn inflated(world: &World) -> Result<()> {
    let config = BalloonConfig {
        page_reporting: false,
        ..BalloonConfig::default()
    };
    let mut guest = MemoryGuest::boot(world, 512, config)?;
    // Some that stays, and nearly all of the rest, once: what the guest never touched, the host has
    // never given, and couldn't get back.
    equal(guest.ask("fill 64")?.as_str(), "filled")?;
    equal(guest.ask("fill all but 8")?.as_str(), "filled")?;
    equal(guest.ask("drop")?.as_str(), "dropped")?;
    let before = guest.resident()?;
    let target = 256 * MIB;
    guest.vm().set_balloon(target)?;
    guest.vm().await_balloon(DEADLINE)?;
    let after = guest.resident()?;
    let dropped = before.saturating_sub(after);
    ensure!(
        dropped >= target * 95 / 100,
        "resident {} MiB, then {} MiB",
        before / MIB,
        after / MIB
    );
    equal(guest.ask("check")?.as_str(), "intact")?;

    guest.vm().set_balloon(0)?;
    guest.vm().await_balloon(DEADLINE)?;
    equal(guest.ask("fill 256")?.as_str(), "filled")?;
    equal(guest.ask("check")?.as_str(), "intact")?;
    let stats = guest.vm().balloon_stats()?;
    equal((stats.actual, stats.refused_pages), (0, 0))?;
    guest.end()
}

/// A guest that needs what is in the balloon takes it, and kills nobody.
fn oom(world: &World) -> Result<()> {
    let mut guest = MemoryGuest::boot(world, 512, BalloonConfig::default())?;
    let target = 320 * MIB;
    guest.vm().set_balloon(target)?;
    guest.vm().await_balloon(DEADLINE)?;
    equal(guest.ask("fill 256")?.as_str(), "filled")?;
    equal(guest.ask("check")?.as_str(), "intact")?;
    equal(guest.ask("ooms")?.as_str(), "0")?;
    let stats = guest.vm().balloon_stats()?;
    ensure!(
        stats.target == target && stats.actual < target,
        "the balloon has not given way: {stats:?}"
    );
    guest.end()
}

/// A VM whose guest uses memory as it is told.
struct MemoryGuest(Told);

impl MemoryGuest {
    fn boot(world: &World, mebibytes: u64, balloon: BalloonConfig) -> Result<Self> {
        let told = Told::boot(world, "memory", |spec| {
            spec.memory = mebibytes << 20;
            spec.balloon = Some(balloon);
        })?;
        Ok(Self(told))
    }

    fn vm(&self) -> &VmHandle {
        &self.0.machine.vm
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        self.0.ask(command)
    }

    /// Bytes that the VMM's process has in memory, the guest's among them.
    fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.vm().pid()))
            .context("the VMM is gone")?;
        let kibibytes = status.lines().find_map(|line| {
            let value = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            value.parse::<u64>().ok()
        });
        Ok(kibibytes.context("the VMM has no memory")? << 10)
    }

    fn end(self) -> Result<()> {
        self.0.machine.end()
    }
}
