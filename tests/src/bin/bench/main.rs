//! Figures of ours beside runc's and QEMU's, taken in one run.
//!
//!     bench --images DIR [--icount] [--runs N] [--profile] …
//!
//! In wall time: containers through containerd, memory, and boots. With `--icount`, on a machine of
//! one processor whose clock counts instructions: boots alone, which then repeat to a percent.
//! What goes to `$SUPERMACHINE_OUT`: the tables, and the traces they were made from.

mod boots;
mod clones;
mod containers;
mod disks;
mod guest;
mod machine;
mod memory;
mod report;
mod trace;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use supermachine_tests::step::say;
use supermachine_tests::{RUNC, RUNTIME};

use boots::{Boot, Exits};
use containers::Host;
use guest::Init;
use machine::{Acpi, Cache, Files, Time, Vmm};
use memory::Idle;
use report::{Report, durations, milliseconds};
use trace::Tracer;

/// Programs that are QEMU, the one with least in it first.
const QEMU: [&str; 2] = ["qemu-system-x86_64-microvm", "qemu-system-x86_64"];
/// The reasons of exits that are named.
const REASONS: usize = 6;
/// Whose disks are measured.
const DISKS: [&str; 3] = [
    "supermachine",
    "QEMU microvm, cache=writeback",
    "QEMU microvm, cache=none",
];
/// How long each case of disk I/O takes in wall time, and where the clock counts instructions.
const MEASURED: Duration = Duration::from_secs(2);
const COUNTED: Duration = Duration::from_millis(50);
/// Where an installation has it.
const VMM: &str = "/usr/local/libexec/supermachine-vmm";
const COUNTED_TITLE: &str = "Counted in instructions (1 ms is a million)";

#[derive(Debug, Parser)]
struct Args {
    /// Folder with busybox.tar, an OCI archive
    #[arg(long)]
    images: PathBuf,
    /// Only what is counted in instructions: the clock of this machine does that
    #[arg(long)]
    icount: bool,
    /// Measured runs of each kind, after one that isn't
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The program that is measured as the VMM, instead of the installation's
    #[arg(long)]
    vmm: Option<PathBuf>,
    /// The configuration that names kernel and initramfs, and the VMM where that is elsewhere
    #[arg(
        long,
        env = "SUPERMACHINE_CONFIG",
        default_value = "/etc/supermachine/config.toml"
    )]
    config: PathBuf,
    /// Leave containers out
    #[arg(long)]
    no_containers: bool,
    /// Only disk I/O; with `--icount` too, which else leaves it out
    #[arg(long)]
    disks: bool,
    /// Also trace system calls and page faults of one boot each
    #[arg(long)]
    profile: bool,
}

fn main() -> ExitCode {
    // This program can be its own `--vmm`.
    if let Some(code) = supermachine_vmm::child::main() {
        return code;
    }
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("bench: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    // On a disk, not on tmpfs.
    let dir = tempfile::tempdir_in("/var/tmp").context("no folder for the bench")?;
    let out = std::env::var_os("SUPERMACHINE_OUT").map_or_else(|| dir.path().into(), PathBuf::from);
    let qemu = on_path(&QEMU)?;
    let case = if args.icount { COUNTED } else { MEASURED };
    let Installation {
        kernel,
        initramfs,
        vmm,
    } = Installation::of(&args.config)?;
    let vmm = args.vmm.clone().unwrap_or(vmm);
    let bench = Bench {
        files: Files::new((kernel, initramfs), case, dir.path())?,
        ours: Vmm::Ours(vmm.clone()),
        with_acpi: Vmm::Qemu(qemu.clone(), Acpi::On),
        qemu: Vmm::Qemu(qemu, Acpi::Off),
        tracer: Tracer::open()?,
        out,
        runs: args.runs,
    };
    let disks = match (args.icount, args.disks) {
        (false, _) => bench.disks(3).finish("Wall time, disks", "disks.md"),
        // Where waiting takes no time, nothing can be said of I/O that waits for the disk.
        (true, true) => bench.disks(2).finish(COUNTED_TITLE, "disks-icount.md"),
        (true, false) => Ok(()),
    };
    if args.disks {
        return disks;
    }
    let mut report = Report::new(&["supermachine", "beside"]);
    if !args.icount && !args.no_containers {
        containers(&mut report, &args.images, args.runs);
    }
    bench.boots(&mut report);
    bench.clones(&mut report, args.profile);
    if !args.icount {
        bench.idle(&mut report);
        sizes(&mut report, &vmm);
    }
    if args.profile {
        bench.profile(&mut report);
    }
    if args.icount {
        report.finish(COUNTED_TITLE, "icount.md")
    } else {
        report.finish("Wall time", "wall.md").and(disks)
    }
}

/// What is installed.
struct Installation {
    kernel: PathBuf,
    initramfs: PathBuf,
    vmm: PathBuf,
}

impl Installation {
    /// As its configuration has it.
    fn of(config: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(config)
            .with_context(|| format!("cannot read {}", config.display()))?;
        let table: toml::Table = text.parse().context("the configuration is not TOML")?;
        let path = |section: &str, key: &str| {
            let value = table
                .get(section)
                .and_then(|section| section.get(key)?.as_str());
            value
                .map(PathBuf::from)
                .with_context(|| format!("the configuration has no {section}.{key}"))
        };
        Ok(Self {
            kernel: path("kernel", "path")?,
            initramfs: path("kernel", "initramfs")?,
            vmm: path("vm", "program").unwrap_or_else(|_| VMM.into()),
        })
    }
}

/// The first of `names` that is a file on PATH, or as it stands.
fn on_path(names: &[&str]) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    names
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|file| file.is_file())
        .with_context(|| format!("{} is not on PATH", names.join(" nor ")))
}

fn containers(report: &mut Report, images: &Path, runs: usize) {
    let Some(host) = report.take("containers", Host::start(images)) else {
        return;
    };
    let [ours, runc] = host.runs(runs);
    let ours = report
        .take("containers on supermachine", ours)
        .unwrap_or_default();
    let runc = report.take("containers on runc", runc).unwrap_or_default();
    let name = "`ctr run … echo` to first output (beside: runc)";
    report.row(name, durations(&ours.run), durations(&runc.run));
    report.row(
        "the same to the end of `ctr`",
        durations(&ours.run_end),
        durations(&runc.run_end),
    );
    let ours = report
        .take("exec on supermachine", host.sleeper(RUNTIME, runs))
        .unwrap_or_default();
    let runc = report
        .take("exec on runc", host.sleeper(RUNC, runs))
        .unwrap_or_default();
    let name = "`ctr task exec … echo` to first output (beside: runc)";
    report.row(name, durations(&ours.0), durations(&runc.0));
    let name = "idle shim, RSS / PSS / private dirty (beside: runc's)";
    report.row(name, memory_of(ours.1.first()), memory_of(runc.1.first()));
    let name = "idle VMM beside the guest's RAM, with all devices";
    report.row(name, memory_of(ours.1.get(1)), "—");
    let name = "idle shim, context switches a second (beside: runc's)";
    report.row(name, wakeups(ours.1.first()), wakeups(runc.1.first()));
    report.row(
        "idle VMM, context switches a second",
        wakeups(ours.1.get(1)),
        "—",
    );
}

fn sizes(report: &mut Report, vmm: &Path) {
    let programs = [
        ("containerd-shim-supermachine-v2", None),
        ("supermachine-vmm", Some(vmm)),
        ("supermachine", None),
    ];
    for (name, path) in programs {
        let path = path.map_or_else(|| on_path(&[name]), |path| Ok(path.into()));
        let size = path.and_then(|path| Ok(path.metadata()?.len()));
        if let Some(size) = report.take(name, size) {
            report.row(
                &format!("size of `{name}`, static"),
                mebibytes(size >> 10),
                "—",
            );
        }
    }
}

struct Bench {
    files: Files,
    ours: Vmm,
    qemu: Vmm,
    with_acpi: Vmm,
    tracer: Tracer,
    out: PathBuf,
    runs: usize,
}

impl Bench {
    /// By turns; the first of each finds cold caches and is not counted.
    fn boots(&self, report: &mut Report) {
        let [mut ours, mut qemu, mut with_acpi] = [const { Vec::new() }; 3];
        let mut agent = Vec::new();
        for turn in 0..=self.runs {
            for (vmm, boots) in [
                (&self.ours, &mut ours),
                (&self.qemu, &mut qemu),
                (&self.with_acpi, &mut with_acpi),
            ] {
                let boot = boots::boot(&self.tracer, vmm, &self.files);
                boots.extend(report.take(vmm.name(), boot).filter(|_| turn > 0));
            }
            let Vmm::Ours(exe) = &self.ours else { continue };
            let ready = boots::agent_ready(&self.tracer, exe, &self.files);
            agent.extend(report.take("agent ready", ready).filter(|_| turn > 0));
        }
        let pick = |boots: &[Boot], field: fn(&Boot) -> u64| {
            milliseconds(&boots.iter().map(field).collect::<Vec<_>>())
        };
        let beside = format!("(beside: {})", self.qemu.name());
        let init: fn(&Boot) -> u64 = |boot| boot.to_init;
        let end: fn(&Boot) -> u64 = |boot| boot.to_end;
        let name = format!("exec of the VMM to a bare `/init` {beside}");
        report.row(&name, pick(&ours, init), pick(&qemu, init));
        report.row(
            "the same to its end, after a reset",
            pick(&ours, end),
            pick(&qemu, end),
        );
        let name = format!("the former of {}", self.with_acpi.name());
        report.row(&name, "—", pick(&with_acpi, init));
        report.row(
            "exec of the VMM to agent ready, all devices",
            milliseconds(&agent),
            "—",
        );
        self.exits(report, &beside);
    }

    fn exits(&self, report: &mut Report, beside: &str) {
        let exits = |vmm: &Vmm, file: &str| {
            boots::exits(&self.tracer, vmm, &self.files, &self.out.join(file))
        };
        let ours = report.take("exits of supermachine", exits(&self.ours, "exits-ours.txt"));
        let qemu = report.take("exits of QEMU", exits(&self.qemu, "exits-qemu.txt"));
        let with_acpi = exits(&self.with_acpi, "exits-qemu-acpi.txt");
        let with_acpi = report.take("exits of QEMU with ACPI", with_acpi);
        let of = |exits: &Option<Exits>, text: fn(&Exits) -> String| {
            exits.as_ref().map_or_else(|| "—".to_owned(), text)
        };
        let part: fn(&Exits) -> String = |exits| milliseconds(&[exits.vmm_part]);
        let total: fn(&Exits) -> String = |exits| exits.total.to_string();
        let name = format!("the VMM's part of it: exec to first KVM_RUN {beside}");
        report.row(&name, of(&ours, part), of(&qemu, part));
        report.row(
            &format!("exits until `/init` {beside}"),
            of(&ours, total),
            of(&qemu, total),
        );
        report.row(
            "their most frequent reasons",
            of(&ours, reasons),
            of(&qemu, reasons),
        );
        let name = format!("exits of {}, and their reasons", self.with_acpi.name());
        let all: fn(&Exits) -> String = |exits| format!("{}: {}", exits.total, reasons(exits));
        report.row(&name, "—", of(&with_acpi, all));
    }

    /// VMs that go on from a snapshot; the first finds cold caches and is not counted.
    fn clones(&self, report: &mut Report, profile: bool) {
        let Vmm::Ours(exe) = &self.ours else { return };
        let Some(dir) = report.take(
            "snapshot",
            tempfile::tempdir_in("/var/tmp").map_err(Into::into),
        ) else {
            return;
        };
        let snapshot = clones::snapshot(&self.tracer, exe, &self.files, dir.path());
        let Some((snapshot, booted)) = report.take("snapshot", snapshot) else {
            return;
        };
        let clone = |time: Time, raw: Option<&Path>| {
            clones::clone(&self.tracer, exe, &self.files, &snapshot, time, raw)
        };
        let mut clones_of = |time: Time| {
            let mut all = Vec::new();
            for turn in 0..=self.runs {
                let clone = report.take("clone", clone(time, None));
                all.extend(clone.filter(|_| turn > 0));
            }
            all
        };
        let [prepared, unprepared] = [Time::Enough, Time::No].map(&mut clones_of);
        if profile {
            let raw = self.out.join("profile-clone.txt");
            report.take("profile", clone(Time::Enough, Some(&raw)));
        }
        let pick =
            |field: fn(&clones::Clone) -> u64| prepared.iter().map(field).collect::<Vec<_>>();
        report.row(
            "snapshot of a VM of 256 MiB whose agent waits",
            milliseconds(&[snapshot.took]),
            "—",
        );
        report.row(
            "its file, on the disk / in length",
            format!(
                "{} / {}",
                mebibytes(snapshot.used),
                mebibytes(snapshot.length)
            ),
            "—",
        );
        report.row(
            "restore, exec of the VMM to a connection that the guest has accepted",
            milliseconds(&pick(|clone| clone.accepted)),
            "—",
        );
        report.row(
            "restore, exec to the agent's first answer (beside: our cold boot to the same)",
            milliseconds(&pick(|clone| clone.answered)),
            milliseconds(&[booted]),
        );
        let first: Vec<_> = unprepared.iter().map(|clone| clone.answered).collect();
        report.row(
            "the latter for a shim that had no time to prepare",
            milliseconds(&first),
            "—",
        );
        let private = pick(|clone| clone.private);
        report.row(
            "private memory of an idle clone, guest RAM included",
            private
                .iter()
                .max()
                .map_or_else(|| "—".to_owned(), |kib| mebibytes(*kib)),
            "—",
        );
    }

    /// Disk I/O of the first `count` of [`DISKS`].
    fn disks(&self, count: usize) -> Report {
        let disks = [
            (&self.ours, Cache::Page),
            (&self.with_acpi, Cache::Page),
            (&self.with_acpi, Cache::Direct),
        ];
        let mut report = Report::new(&DISKS[..count]);
        disks::report(
            &mut report,
            &disks[..count],
            &self.files,
            &self.tracer,
            self.runs,
        );
        report
    }

    /// The bare VMMs while their guest sleeps; without ACPI no timer would wake QEMU.
    fn idle(&self, report: &mut Report) {
        let watch = |vmm: &Vmm| -> Result<Idle> {
            let running = vmm.boot(&self.files, Init::Idle)?;
            let idle = memory::watch(&[running.pid()]);
            running.kill();
            idle?.pop().context("nothing was watched")
        };
        let ours = report.take("idle supermachine", watch(&self.ours));
        let qemu = report.take("idle QEMU", watch(&self.with_acpi));
        let name = format!(
            "idle VMM beside the guest's RAM, one disk, RSS / PSS / private dirty (beside: {})",
            self.with_acpi.name()
        );
        report.row(&name, memory_of(ours.as_ref()), memory_of(qemu.as_ref()));
        report.row(
            "its context switches a second",
            wakeups(ours.as_ref()),
            wakeups(qemu.as_ref()),
        );
    }

    fn profile(&self, report: &mut Report) {
        for (vmm, file) in [
            (&self.ours, "profile-ours.txt"),
            (&self.qemu, "profile-qemu.txt"),
        ] {
            let done = boots::profile(&self.tracer, vmm, &self.files, &self.out.join(file));
            report.take("profile", done);
        }
    }
}

fn reasons(exits: &Exits) -> String {
    let named = exits.reasons.iter().take(REASONS);
    named
        .map(|(name, count)| format!("{name} {count}"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn memory_of(idle: Option<&Idle>) -> String {
    idle.map_or_else(
        || "—".to_owned(),
        |idle| {
            let [resident, proportional, dirty] =
                [idle.resident, idle.proportional, idle.private_dirty].map(mebibytes);
            format!("{resident} / {proportional} / {dirty}")
        },
    )
}

fn wakeups(idle: Option<&Idle>) -> String {
    idle.map_or_else(
        || "—".to_owned(),
        |idle| format!("{:.1} ({} threads)", idle.wakeups, idle.threads),
    )
}

fn mebibytes(kibibytes: u64) -> String {
    format!("{:.1} MiB", kibibytes as f64 / 1024.0)
}
