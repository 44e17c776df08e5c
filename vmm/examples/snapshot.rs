//! Snapshots a VM while it works, and has others go on from there:
//! `snapshot --kernel FILE --initramfs FILE --disk FILE --dir DIR [--cmdline TEXT] [--memory MIB]
//! [--vcpus N] [--lines N] [--ask PORT] [--clones N] [--at-once N]`.
//!
//! The guest writes lines to its first console port. After `--lines` of them it is snapshotted, goes
//! on for as many, and is snapshotted again, as a diff, and ended. Each clone, with a copy of the
//! disk, goes on for as many lines, which are printed: every other one from the diff. With `--ask`,
//! connections to that vsock port of the guest are opened, one after the other, and what each says
//! is printed too, with when that was asked and answered, in microseconds. `--clones` run one after
//! the other, then `--at-once` at the same time.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use supermachine_vmm::devices::virtio::console::{ConsoleConfig, PortConfig, PortEnds};
use supermachine_vmm::devices::virtio::vsock::VsockConfig;
use supermachine_vmm::snapshot::SnapshotFile;
use supermachine_vmm::{DiskConfig, RestoreConfig, RunningVm, Vm, VmConfig};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long vCPUs may take to come out of the guest.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the guest may take for an answer.
const ANSWER: Duration = Duration::from_secs(60);
/// How often it is asked: what it says in between shows how its clock runs.
const ASKED: usize = 3;

/// What the command line says.
struct Options {
    disk: PathBuf,
    dir: PathBuf,
    lines: usize,
    ask: Option<u32>,
    clones: usize,
    at_once: usize,
}

/// What clones go on from.
struct Saved {
    /// A full snapshot, and the diff on it if that is newer.
    snapshot: Vec<PathBuf>,
    /// The disk as it was then.
    disk: PathBuf,
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

    let saved = original(config, &options)?;
    let of = |number: usize| &saved[number % saved.len()];
    for number in 0..options.clones {
        clone(&format!("clone {number}"), of(number), &options)?;
    }
    thread::scope(|scope| {
        let clones: Vec<_> = (0..options.at_once)
            .map(|number| {
                let name = format!("beside {number}");
                let options = &options;
                scope.spawn(move || clone(&name, of(number), options))
            })
            .collect();
        clones
            .into_iter()
            .try_for_each(|clone| clone.join().map_err(|_| "a clone panicked")?)
    })
}

/// Runs the VM until it has said enough, and once more as long; what it was each time.
fn original(mut config: VmConfig, options: &Options) -> Result<[Saved; 2]> {
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
    let mut said = BufReader::new(said);
    tell("original", &mut said, &socket, options)?;
    let full = save("full", &running, &[], options)?;
    running.resume();
    tell("resumed", &mut said, &socket, options)?;
    let diff = save("diff", &running, &full.snapshot, options)?;
    end("original", &running)?;
    Ok([full, diff])
}

/// Writes what the VM is to a directory of that name, the disk beside it; it stays paused.
fn save(name: &str, running: &RunningVm, base: &[PathBuf], options: &Options) -> Result<Saved> {
    let dir = options.dir.join(name);
    std::fs::create_dir(&dir)?;
    running.pause(PATIENCE)?;
    let chain = base
        .iter()
        .map(|path| Ok(SnapshotFile::open(File::open(path)?)?))
        .collect::<Result<Vec<_>>>()?;
    let written = running.snapshot(&dir, (!chain.is_empty()).then_some(&chain))?;
    writeln!(
        std::io::stdout(),
        "{name} snapshot: {} KiB",
        written.metadata()?.blocks() / 2
    )?;
    // It is not of the snapshot, and goes with it.
    let disk = dir.join("disk");
    std::fs::copy(&options.disk, &disk)?;
    let snapshot = base.iter().cloned().chain([written]).collect();
    Ok(Saved { snapshot, disk })
}

/// Goes on from the snapshot, with things of its own.
fn clone(name: &str, saved: &Saved, options: &Options) -> Result<()> {
    let place = options.dir.join(name.replace(' ', "-"));
    std::fs::copy(&saved.disk, place.with_extension("disk"))?;
    let socket = place.with_extension("sock");
    let (said, output) = std::io::pipe()?;
    let [base, diffs @ ..] = &saved.snapshot[..] else {
        return Err("no snapshot".into());
    };
    let mut config = RestoreConfig::new(File::open(base)?);
    for diff in diffs {
        config.snapshot.push(File::open(diff)?);
    }
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
    tell(name, &mut BufReader::new(said), &socket, options)?;
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
fn tell(
    name: &str,
    said: &mut BufReader<PipeReader>,
    socket: &Path,
    options: &Options,
) -> Result<()> {
    let began = Instant::now();
    for line in said.lines().take(options.lines) {
        writeln!(std::io::stdout(), "{name}: {}", line?)?;
    }
    let Some(port) = options.ask else {
        return Ok(());
    };
    for _ in 0..ASKED {
        let asked = began.elapsed().as_micros();
        let answer = ask(socket, port)?;
        let answered = began.elapsed().as_micros();
        writeln!(
            std::io::stdout(),
            "{name} from {asked} to {answered}: {answer}"
        )?;
    }
    Ok(())
}

/// Connects to a port of the guest; the line it says.
fn ask(socket: &Path, port: u32) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answers = BufReader::new(stream).lines();
    let connected = answers.next().ok_or("no connection to the guest")??;
    if !connected.starts_with("OK ") {
        return Err(connected.into());
    }
    Ok(answers.next().ok_or("no answer of the guest")??)
}

fn end(name: &str, running: &RunningVm) -> Result<()> {
    running.stop();
    writeln!(std::io::stdout(), "{name} ended: {}", running.wait())?;
    Ok(())
}
