//! The host runs out of something: disk, descriptors, memory.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use supermachine_tests::bundle::Bundle;
use supermachine_tests::fifo::Fifo;
use supermachine_tests::shim::{Shim, ShimConfig, refusal};
use supermachine_tests::until;

use super::{EXEC, ended, process, shim};
use crate::bad::configured;
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

pub(super) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("faults::disk_full_of_what_is_written", disk_full),
        world.vm_test("faults::disk_full_of_ledgers", state_full),
        world.vm_test(
            "faults::no_descriptors_at_a_start",
            no_descriptors_at_a_start,
        ),
        world.vm_test("faults::disk_full_of_images", images_full),
        world.vm_test("faults::no_descriptors_later", no_descriptors_later),
        world.vm_test("faults::no_memory_at_a_start", no_memory_at_a_start),
    ]
}

/// A small file system of the test's own.
struct Disk {
    path: PathBuf,
}

impl Disk {
    fn new(world: &World, name: &str) -> Result<Self> {
        let path = world.files()?.join(name);
        fs::create_dir(&path)?;
        mount(
            "tmpfs",
            &path,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=4k"),
        )?;
        Ok(Self { path })
    }

    /// Changes its size.
    fn resize(&self, kib: u64) -> Result<()> {
        let size = std::ffi::CString::new(format!("size={kib}k"))?;
        let flags = MountFlags::empty();
        Ok(rustix::mount::mount_remount(
            &self.path,
            flags,
            size.as_c_str(),
        )?)
    }

    /// KiB in use, by files with a name and without.
    fn used(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(&self.path)?;
        Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize / 1024)
    }

    /// Its path as a TOML value.
    fn quoted(&self) -> String {
        format!("{:?}", self.path.display().to_string())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.path);
    }
}

/// A container that writes more than the host has gets an error, and nobody else's end.
fn disk_full(world: &World) -> Result<()> {
    let disk = Disk::new(world, "full")?;
    disk.resize(16 << 10)?;
    let config = configured(world, &[("rootfs", "directory", &disk.quoted())])?;
    leaves_nothing(world, || {
        let script = "dd if=/dev/zero of=/file bs=1M count=64 conv=fsync || exit 5";
        let (shim, bundle) = shim(world, &config, &["sh", "-c", script])?;
        shim.create(&bundle)?;
        shim.start_task()?;
        ended(&shim, 5)?;
        // Its disk, which has no name, goes too: a worker of the kernel's drops io_uring's files
        // some time after the process.
        until("the disk's end", Duration::from_secs(10), || {
            Ok(disk.used()? == 0)
        })
    })
}

/// No image of a layer fits. The program that makes it comes to an end, and so does the start.
fn images_full(world: &World) -> Result<()> {
    let disk = Disk::new(world, "images")?;
    disk.resize(256)?;
    let config = configured(world, &[("images", "directory", &disk.quoted())])?;
    let create = |shim: &Shim, bundle: &Bundle| {
        let overlay = shim.overlay(bundle)?;
        shim.create_with(|request| request.rootfs = vec![overlay])
    };
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &config, &["true"])?;
        let (_, text) = refusal(create(&shim, &bundle))?;
        ensure!(
            text.contains("mkfs.erofs failed"),
            "not what failed: {text}"
        );
        ensure!(text.contains("No space left"), "not the reason: {text}");
        for left in fs::read_dir(&disk.path)? {
            // Whether the kernel's file is the one that is configured is remembered here.
            let left = left?.path();
            ensure!(
                left.extension().is_some_and(|is| is == "sha256"),
                "left: {left:?}"
            );
        }
        Ok(())
    })?;
    // With space, the same comes to life.
    disk.resize(64 << 10)?;
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &config, &["sh", "-c", "exit 4"])?;
        create(&shim, &bundle)?;
        shim.start_task()?;
        ended(&shim, 4)
    })
}

/// A shim, or a VMM, that can open nothing more refuses what needs more, and goes on.
fn no_descriptors_later(world: &World) -> Result<()> {
    for whose in ["shim", "VMM"] {
        leaves_nothing(world, || {
            let (shim, bundle) = shim(world, &world.shim()?, &["sleep", "1000"])?;
            let vmm = shim.create(&bundle)?;
            shim.start_task()?;
            let out = Fifo::new(&bundle.dir.join("out"))?;
            let exec = || {
                shim.exec_with(EXEC, &process(&["echo", "x"]), |request| {
                    request.stdout = out.path.display().to_string();
                })?;
                let started = shim.start_exec(EXEC);
                if started.is_err() {
                    shim.delete_exec(EXEC)?;
                }
                started
            };
            let pid = if whose == "shim" { shim.pid()? } else { vmm };
            let pid = Pid::from_raw(i32::try_from(pid)?).context("a process")?;
            let before = prlimit(Some(pid), Resource::Nofile, none_more(pid)?)?;
            let (_, text) = refusal(exec())?;
            ensure!(
                text.contains("Too many open files") || text.contains("os error 24"),
                "not the reason: {text}"
            );
            prlimit(Some(pid), Resource::Nofile, before)?;
            exec()?;
            equal(shim.end_exec(EXEC)?, 0)?;
            shim.kill(9)?;
            ended(&shim, 137)
        })
        .context(whose)?;
    }
    Ok(())
}

/// A limit under which a process opens nothing: its first free descriptor is beyond.
fn none_more(pid: Pid) -> Result<Rlimit> {
    let open = |number: u64| fs::exists(format!("/proc/{}/fd/{number}", pid.as_raw_nonzero()));
    let mut free = 0;
    while open(free)? {
        free += 1;
    }
    Ok(Rlimit {
        current: Some(free),
        maximum: Some(free),
    })
}

/// Grows what the host has until a container starts; before, each start is an error that says
/// `reason` at least once, and leaves nothing. `look` looks for more that could be left.
fn until_it_starts(
    world: &World,
    amounts: impl IntoIterator<Item = u64>,
    mut config: impl FnMut(u64) -> Result<ShimConfig>,
    reasons: &[&str],
    look: impl Fn() -> Result<()>,
) -> Result<()> {
    let mut said = Vec::new();
    for amount in amounts {
        let config = config(amount)?;
        let mut starts = false;
        leaves_nothing(world, || {
            match start_in(world, &config)? {
                None => starts = true,
                Some(text) => said.push(format!("{amount}: {text}")),
            }
            look()
        })
        .with_context(|| format!("with {amount}; before:\n{}", said.join("\n")))?;
        if starts {
            let said = said.join("\n");
            let named = |reason: &&str| said.contains(*reason);
            ensure!(
                reasons.iter().any(named),
                "none of {reasons:?} is in the errors:\n{said}"
            );
            return Ok(());
        }
    }
    bail!("it never started:\n{}", said.join("\n"))
}

/// A whole life of a container, or why there is none. Its shim answers, whatever happens.
fn start_in(world: &World, config: &ShimConfig) -> Result<Option<String>> {
    let (shim, bundle) = match shim(world, config, &["sh", "-c", "exit 4"]) {
        Ok(started) => started,
        Err(error) => return Ok(Some(format!("{error:#}"))),
    };
    let started = shim.create(&bundle).and_then(|_| shim.start_task());
    if started.is_err() {
        return Ok(Some(refusal(started)?.1));
    }
    ended(&shim, 4)?;
    Ok(None)
}

fn state_full(world: &World) -> Result<()> {
    let disk = Disk::new(world, "state")?;
    let look = || {
        let left: Vec<_> = fs::read_dir(&disk.path)?.collect();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    };
    // A ledger is a page, and another while it is replaced.
    let config = |kib: u64| {
        disk.resize(kib)?;
        configured(world, &[("state", "directory", &disk.quoted())])
    };
    until_it_starts(world, [4, 8, 64], config, &["No space left"], look)
}

/// A shim that is run with a limit, as `prlimit` sets it.
fn limited(world: &World, limit: &str, amount: u64) -> Result<ShimConfig> {
    let wrapper = ["prlimit".to_owned(), format!("--{limit}={amount}")];
    Ok(ShimConfig {
        wrapper: wrapper.to_vec(),
        ..world.shim()?
    })
}

fn no_descriptors_at_a_start(world: &World) -> Result<()> {
    let config = |files| limited(world, "nofile", files);
    let reasons = ["The limit of open files is 60, expected"];
    until_it_starts(world, [16, 28, 60, 120, 1024], config, &reasons, || Ok(()))
}

fn no_memory_at_a_start(world: &World) -> Result<()> {
    let config = |mib: u64| limited(world, "as", mib << 20);
    let reasons = ["Cannot map 536870912 bytes of guest RAM"];
    until_it_starts(
        world,
        [32, 64, 128, 256, 512, 2048],
        config,
        &reasons,
        || Ok(()),
    )
}
