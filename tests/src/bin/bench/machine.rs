//! The same guest on our VMM and on QEMU: same kernel, initramfs, command line, processor, memory
//! and disk.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use supermachine_tests::initramfs::Initramfs;
use supermachine_tests::program::wait;
use supermachine_vmm::control::{
    BootSpec, ConsoleSpec, DiskSpec, Event, Exit, Preparation, SpawnConfig, VmHandle, VsockSpec,
};
use supermachine_vmm::devices::virtio::balloon::BalloonConfig;

use crate::guest::{self, Init};
use crate::trace;

const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 reboot=t tsc=reliable";
/// Ports of the console where there is an agent.
pub(crate) const PORTS: u32 = 17;
const MEMORY: u64 = 128 << 20;
const DISK: u64 = 16 << 20;
/// The disk that I/O is measured on: more than the guest could cache.
const DATA: u64 = 256 << 20;
/// What the guest that does disk I/O is told beside [`COMMAND_LINE`].
const DISK_IO: &str = "GUEST=disk GUEST_MILLISECONDS=";
/// Where cgroup v2 is, if that is the host's only one.
const CGROUPS: &str = "/sys/fs/cgroup";
/// The longest a guest may take on an emulated machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// The files of the bare guest.
#[derive(Debug)]
pub(crate) struct Files {
    /// An ELF kernel.
    pub(crate) kernel: PathBuf,
    /// The agent's initramfs, where it is built.
    pub(crate) agent: PathBuf,
    /// How long each case of disk I/O takes.
    case: Duration,
    dir: PathBuf,
    /// Where our VMM's process is born, if the host has cgroup v2 alone and lets us make one.
    cgroup: Option<PathBuf>,
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            // Refused while a machine is in it, which there is none any more.
            let _ = std::fs::remove_dir(cgroup);
        }
    }
}

impl Files {
    /// Makes what the guest needs in `dir`.
    pub(crate) fn new(
        (kernel, agent): (PathBuf, PathBuf),
        case: Duration,
        dir: &Path,
    ) -> Result<Self> {
        let mut files = Self {
            kernel,
            agent,
            case,
            dir: dir.to_path_buf(),
            cgroup: None,
        };
        let cgroup = format!("supermachine-bench-{}", std::process::id());
        let cgroup = Path::new(CGROUPS).join(cgroup);
        if Path::new(CGROUPS).join("cgroup.procs").exists() && std::fs::create_dir(&cgroup).is_ok()
        {
            files.cgroup = Some(cgroup);
        }
        for init in [Init::Reset, Init::Idle] {
            std::fs::write(files.initramfs(init), guest::initramfs(init))
                .context("cannot write an initramfs")?;
        }
        let disk = File::create(files.disk()).context("cannot make a disk")?;
        disk.set_len(DISK).context("cannot size a disk")?;
        let program = std::env::current_exe()
            .context("cannot find this program")?
            .with_file_name("guest");
        let init = Initramfs::of_program(&program)?;
        std::fs::write(files.dir.join("disk.cpio"), init.finish())
            .context("cannot write an initramfs")?;
        // Written whole: what is measured is I/O, not the host's allocation of blocks.
        std::fs::write(files.dir.join("data"), vec![0x5a; DATA as usize])
            .context("cannot fill a disk")?;
        Ok(files)
    }

    fn initramfs(&self, init: Init) -> PathBuf {
        self.dir.join(match init {
            Init::Reset => "reset.cpio",
            Init::Idle => "idle.cpio",
        })
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// What the guest that does disk I/O has said.
    pub(crate) fn serial(&self) -> Result<String> {
        std::fs::read_to_string(self.dir.join("serial")).context("no serial output was kept")
    }

    fn spawn_config(&self, exe: &Path) -> SpawnConfig {
        SpawnConfig {
            exe: exe.to_path_buf(),
            cgroups: self.cgroup.iter().cloned().collect(),
            disks: 1,
            ..SpawnConfig::new("bench")
        }
    }

    /// Where the agent would be reached.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("vsock")
    }
}

/// A VMM to compare.
#[derive(Debug, Clone)]
pub(crate) enum Vmm {
    /// Ours, in a process of its own made from this program.
    Ours(PathBuf),
    /// QEMU's machine for this purpose, with all it can leave out left out.
    Qemu(PathBuf, Acpi),
}

/// Whether QEMU's machine has ACPI. Without it, it describes its interrupt controller in an MP
/// table alone, which our kernel does not read: a guest that boots faster, but has no working disk
/// (`virtio_blk: probe … failed with error -22`) and a clock that stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Acpi {
    Off,
    On,
}

/// How a VMM gets at the file of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Through the host's page cache, as ours does.
    Page,
    /// Past it. QEMU only.
    Direct,
}

/// A VM that runs.
#[derive(Debug)]
pub(crate) enum Running {
    Ours(VmHandle, Receiver<(u64, Event)>),
    Qemu(Child),
}

impl Vmm {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Ours(_) => "supermachine",
            Self::Qemu(_, Acpi::Off) => "QEMU microvm",
            Self::Qemu(_, Acpi::On) => "QEMU microvm with ACPI",
        }
    }

    /// Boots the bare guest.
    pub(crate) fn boot(&self, files: &Files, init: Init) -> Result<Running> {
        match self {
            Self::Ours(exe) => boot_ours(exe, files, &bare(files, init)?),
            Self::Qemu(exe, acpi) => boot_qemu(exe, *acpi, &QemuGuest::bare(files, init)),
        }
    }

    /// Boots the guest that does disk I/O and tells about it on the serial port.
    pub(crate) fn boot_disk(&self, files: &Files, cache: Cache) -> Result<Running> {
        let (archive, data) = (files.dir.join("disk.cpio"), files.dir.join("data"));
        let serial = files.dir.join("serial");
        let log = File::create(&serial).context("cannot keep serial output")?;
        let cmdline = format!("{COMMAND_LINE} {DISK_IO}{}", files.case.as_millis());
        match self {
            Self::Ours(exe) => {
                let mut spec = bare(files, Init::Reset)?;
                spec.initramfs = Some(open(&archive)?);
                spec.cmdline = cmdline;
                spec.serial = Some(log.into());
                let data = File::options().read(true).write(true).open(&data);
                if let Some(disk) = spec.disks.first_mut() {
                    disk.files = vec![data.context("cannot open the disk")?];
                }
                boot_ours(exe, files, &spec)
            }
            Self::Qemu(exe, acpi) => boot_qemu(
                exe,
                *acpi,
                &QemuGuest {
                    kernel: files.kernel.clone(),
                    initramfs: archive,
                    disk: data,
                    cmdline,
                    serial: format!("file:{}", serial.display()),
                    io: Some(cache),
                },
            ),
        }
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn bare(files: &Files, init: Init) -> Result<BootSpec> {
    let disk = File::options()
        .read(true)
        .write(true)
        .open(files.disk())
        .context("cannot open the disk")?;
    Ok(BootSpec {
        vcpus: 1,
        memory: MEMORY,
        kernel: open(&files.kernel)?,
        initramfs: Some(open(&files.initramfs(init))?),
        cmdline: COMMAND_LINE.to_owned(),
        serial: Some(null()?),
        disks: vec![DiskSpec {
            files: vec![disk],
            read_only: false,
            serial: "bench".to_owned(),
        }],
        console: None,
        vsock: None,
        balloon: None,
        rng: false,
    })
}

pub(crate) fn null() -> Result<std::os::fd::OwnedFd> {
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("no /dev/null")?;
    Ok(null.into())
}

/// Boots a guest with the agent and all devices; the answer comes once the agent serves.
pub(crate) fn boot_agent(exe: &Path, files: &Files) -> Result<Running> {
    let _ = std::fs::remove_file(files.socket());
    let listener = UnixListener::bind(files.socket()).context("cannot bind the vsock socket")?;
    let mut spec = bare(files, Init::Reset)?;
    spec.memory = 256 << 20;
    spec.initramfs = Some(open(&files.agent)?);
    spec.console = Some(ConsoleSpec {
        ports: vec!["supermachine.agent".to_owned()],
        max_ports: PORTS,
    });
    spec.vsock = Some(VsockSpec { cid: 3, listener });
    spec.balloon = Some(BalloonConfig::default());
    spec.rng = true;
    let running = boot_ours(exe, files, &spec)?;
    if let Running::Ours(vm, _) = &running {
        vm.attach_port(0, None, Some(null()?))
            .context("the guest has no console")?;
    }
    Ok(running)
}

/// How much time there was between the shim's start, when it prepares, and its being asked for a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Time {
    /// As much as it takes.
    Enough,
    No,
}

/// Starts our VMM's process as the runtime does.
pub(crate) fn start(
    exe: &Path,
    files: &Files,
    time: Time,
    on_event: Box<dyn Fn(Event) + Send>,
) -> Result<VmHandle> {
    let preparation = (time == Time::Enough).then(|| {
        let mut preparation = Preparation::begin();
        preparation.wait();
        preparation
    });
    VmHandle::spawn_prepared(files.spawn_config(exe), preparation, on_event)
        .context("cannot start our VMM")
}

fn boot_ours(exe: &Path, files: &Files, spec: &BootSpec) -> Result<Running> {
    let (sender, events) = mpsc::channel();
    let on_event = move |event| {
        // Refused only once nobody waits any more.
        let _ = sender.send((trace::now().unwrap_or(0), event));
    };
    let vm = start(exe, files, Time::Enough, Box::new(on_event))?;
    vm.boot(spec, DEADLINE)
        .context("our VMM does not boot the guest")?;
    Ok(Running::Ours(vm, events))
}

/// What QEMU boots.
#[derive(Debug)]
struct QemuGuest {
    kernel: PathBuf,
    initramfs: PathBuf,
    disk: PathBuf,
    cmdline: String,
    serial: String,
    /// How it gets at its disk, where that matters.
    io: Option<Cache>,
}

impl QemuGuest {
    fn bare(files: &Files, init: Init) -> Self {
        Self {
            kernel: files.kernel.clone(),
            initramfs: files.initramfs(init),
            disk: files.disk(),
            cmdline: COMMAND_LINE.to_owned(),
            serial: "null".to_owned(),
            io: None,
        }
    }

    /// The drive, and how its device is set up: for I/O, as fast as this QEMU can be.
    fn disk(&self) -> (String, &'static str) {
        let file = format!("id=d,file={},format=raw,if=none", self.disk.display());
        let cache = match self.io {
            None => return (file, "virtio-blk-device,drive=d"),
            Some(Cache::Page) => "writeback",
            Some(Cache::Direct) => "none",
        };
        let drive = format!("{file},cache={cache},aio=io_uring");
        (drive, "virtio-blk-device,drive=d,iothread=io")
    }
}

fn boot_qemu(exe: &Path, acpi: Acpi, guest: &QemuGuest) -> Result<Running> {
    let (drive, device) = guest.disk();
    let acpi = if acpi == Acpi::On { "on" } else { "off" };
    let machine = format!("microvm,acpi={acpi},x-option-roms=off,pit=off,pic=off,rtc=off");
    let mut command = Command::new(exe);
    if guest.io.is_some() {
        command.args(["-object", "iothread,id=io"]);
    }
    let child = command
        // The firmware that it has by default without ACPI; the other one needs its option ROMs.
        .args(["-machine", &machine, "-bios", "qboot.rom"])
        .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", "128M"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-serial", &guest.serial, "-append", &guest.cmdline])
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-drive", &drive, "-device", device])
        // Its transport is virtio 0.9's by default, which our kernel's driver doesn't take.
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start QEMU")?;
    Ok(Running::Qemu(child))
}

impl Running {
    /// Of the VMM's process.
    pub(crate) fn pid(&self) -> u32 {
        match self {
            Self::Ours(vm, _) => vm.pid(),
            Self::Qemu(child) => child.id(),
        }
    }

    /// Waits until the guest has reset; answers when its VMM was gone.
    pub(crate) fn ended(self) -> Result<u64> {
        match self {
            Self::Ours(_vm, events) => loop {
                match events
                    .recv_timeout(DEADLINE)
                    .context("our guest does not end")?
                {
                    (time, Event::Ended(Exit::TripleFault | Exit::Reset)) => return Ok(time),
                    (_, Event::Ended(exit)) => bail!("our guest ended oddly: {exit}"),
                    _ => {}
                }
            },
            Self::Qemu(mut child) => {
                let ended = wait(&mut child, Instant::now() + DEADLINE);
                if ended.is_err() {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                let status = ended.context("QEMU's guest")?;
                anyhow::ensure!(status.success(), "QEMU: {status}");
                trace::now()
            }
        }
    }

    /// Waits for the guest's agent; answers when the news arrived. Ours only.
    pub(crate) fn agent_ready(&self) -> Result<u64> {
        let Self::Ours(_, events) = self else {
            bail!("only our guests have an agent")
        };
        loop {
            match events
                .recv_timeout(DEADLINE)
                .context("the agent does not get ready")?
            {
                (time, Event::PortOpened { port: 0 }) => return Ok(time),
                (_, Event::Ended(exit)) => bail!("the guest ended: {exit}"),
                _ => {}
            }
        }
    }

    /// Kills it.
    pub(crate) fn kill(self) {
        match self {
            Self::Ours(vm, _) => vm.kill(),
            Self::Qemu(mut child) => {
                // Both refuse only what has ended.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
