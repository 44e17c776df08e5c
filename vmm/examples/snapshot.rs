//! Snapshots a VM while it works, and has others go on from there:
//! `snapshot --kernel FILE --initramfs FILE --disk FILE --dir DIR [--cmdline TEXT] [--memory MIB]
//! [--vcpus N] [--lines N] [--ask PORT] [--clones N] [--at-once N]`.
//!
//! The guest writes lines to its first console port. After `--lines` of them it is snapshotted and
//! ended; each clone, with a copy of the disk, goes on for as many lines, which are printed. With
//! `--ask`, a connection to that vsock port of the guest is opened and what it says is printed too.
//! `--clones` of them run one after the other, then `--at-once` at the same time.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use supermachine_vmm::devices::virtio::console::{ConsoleConfig, PortConfig, PortEnds};
use supermachine_vmm::devices::virtio::vsock::VsockConfig;
use supermachine_vmm::{DiskConfig, RestoreConfig, RunningVm, Vm, VmConfig};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long vCPUs may take to come out of the guest.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the command line says.
struct Options {
    disk: PathBuf,
    dir: PathBuf,
    lines: usize,
    ask: Option<u32>,
    clones: usize,
    at_once: usize,
}

fn main() -> Result<()> {
    let mut config = VmConfig::new(File::open("/dev/null")?);
    config.cmdline = format!("console={} quiet panic=-1", VmConfig::SERIAL);
    config.serial = Some(std::io::stderr().as_fd().try_clone_to_owned()?);
    let mut options = Options {
        disk: PathBuf::new(),
        dir: PathBuf::from("."),
        lines: 5,
        ask: None,
        clones: 1,
        at_once: 0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| format!("{option} needs a value"))?;
        match option.as_str() {
            "--kernel" => config.kernel = VmConfig::open_kernel(Path::new(&value))?,
            "--initramfs" => config.initramfs = Some(File::open(value)?),
            "--cmdline" => config.cmdline = value,
            "--memory" => config.memory = value.parse::<u64>()? << 20,
            "--vcpus" => config.vcpus = value.parse()?,
            "--disk" => options.disk = value.into(),
            "--dir" => options.dir = value.into(),
            "--lines" => options.lines = value.parse()?,
            "--ask" => options.ask = Some(value.parse()?),
            "--clones" => options.clones = value.parse()?,
            "--at-once" => options.at_once = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }

    let (snapshot, disk) = original(config, &options)?;
    for number in 0..options.clones {
        clone(&format!("clone {number}"), &snapshot, &disk, &options)?;
    }
    thread::scope(|scope| {
        let clones: Vec<_> = (0..options.at_once)
            .map(|number| {
                let name = format!("beside {number}");
                let (snapshot, disk, options) = (&snapshot, &disk, &options);
                scope.spawn(move || clone(&name, snapshot, disk, options))
            })
            .collect();
        clones
            .into_iter()
            .try_for_each(|clone| clone.join().map_err(|_| "a clone panicked")?)
    })
}

/// Runs the VM until it has said enough. Answers its snapshot, and its disk as it was then.
fn original(mut config: VmConfig, options: &Options) -> Result<(PathBuf, PathBuf)> {
    config.disks = vec![writable(&options.disk)?];
    config.console = Some(ConsoleConfig {
        ports: vec![PortConfig {
            name: "work".into(),
        }],
        max_ports: 1,
        events: Box::new(|_| ()),
    });
    let socket = options.dir.join("original.sock");
    config.vsock = Some(VsockConfig {
        cid: 3,
        listener: UnixListener::bind(&socket)?,
    });
    config.rng = true;
    let running = Vm::new(config)?.start()?;
    let (said, output) = std::io::pipe()?;
    let console = running.console().ok_or("no console")?;
    let ends = PortEnds {
        input: None,
        output: Some(output.into()),
    };
    console.attach(0, ends)?;
    tell("original", said, &socket, options)?;

    running.pause(PATIENCE)?;
    let snapshot = running.snapshot(&options.dir, None)?;
    // It is not of the snapshot, and goes with it.
    let disk = options.dir.join("disk");
    std::fs::copy(&options.disk, &disk)?;
    end("original", &running)?;
    Ok((snapshot, disk))
}

/// Goes on from the snapshot, with things of its own.
fn clone(name: &str, snapshot: &Path, disk: &Path, options: &Options) -> Result<()> {
    let place = options.dir.join(name.replace(' ', "-"));
    std::fs::copy(disk, place.with_extension("disk"))?;
    let socket = place.with_extension("sock");
    let (said, output) = std::io::pipe()?;
    let mut config = RestoreConfig::new(File::open(snapshot)?);
    // It was written by this program just now.
    config.verify_memory = false;
    config.serial = Some(std::io::stderr().as_fd().try_clone_to_owned()?);
    config.disks = vec![writable(&place.with_extension("disk"))?];
    config.vsock = Some(VsockConfig {
        cid: 4,
        listener: UnixListener::bind(&socket)?,
    });
    let ends = PortEnds {
        input: None,
        output: Some(output.into()),
    };
    config.ports = vec![(0, ends)];
    let running = Vm::restore(config)?.start()?;
    tell(name, said, &socket, options)?;
    end(name, &running)
}

fn writable(path: &Path) -> Result<DiskConfig> {
    Ok(DiskConfig {
        files: vec![File::options().read(true).write(true).open(path)?],
        read_only: false,
        serial: "work".into(),
    })
}

/// Prints lines of the guest's as they come, and what it answers when it is asked.
fn tell(name: &str, said: impl std::io::Read, socket: &Path, options: &Options) -> Result<()> {
    let mut lines = BufReader::new(said).lines();
    for _ in 0..options.lines {
        let line = lines.next().ok_or("the guest says no more")??;
        writeln!(std::io::stdout(), "{name}: {line}")?;
    }
    if let Some(port) = options.ask {
        let mut stream = UnixStream::connect(socket)?;
        writeln!(stream, "CONNECT {port}")?;
        let mut answers = BufReader::new(stream).lines();
        let connected = answers.next().ok_or("no connection to the guest")??;
        if !connected.starts_with("OK ") {
            return Err(connected.into());
        }
        let answer = answers.next().ok_or("no answer of the guest")??;
        writeln!(std::io::stdout(), "{name} answers: {answer}")?;
    }
    Ok(())
}

fn end(name: &str, running: &RunningVm) -> Result<()> {
    running.stop();
    writeln!(std::io::stdout(), "{name} ended: {}", running.wait())?;
    Ok(())
}
