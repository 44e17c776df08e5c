//! Linux with the agent as its first process, in a machine whose hypervisor is the backend for
//! Apple's Hypervisor.framework: it boots, answers, gives memory back, is snapshotted and goes on.

#![allow(clippy::unwrap_used, reason = "a test program")]

// It has the functions that the backend calls.
use hvf_on_kvm as _;

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use supermachine_protocol as protocol;
use supermachine_protocol::ttrpc::r#async::Client;
use supermachine_protocol::ttrpc::r#async::transport::Socket;
use supermachine_protocol::ttrpc::context::with_timeout;
use supermachine_vmm::devices::virtio::balloon::BalloonConfig;
use supermachine_vmm::devices::virtio::console::{ConsoleConfig, PortConfig, PortEnds, PortEvent};
use supermachine_vmm::devices::virtio::vsock::VsockConfig;
use supermachine_vmm::hypervisor::Host;
use supermachine_vmm::hypervisor::hvf::Hvf;
use supermachine_vmm::{DiskConfig, Exit, RestoreConfig, RunningVm, Vm, VmConfig};
use tempfile::TempDir;

/// It is not KVM's backend that is tested here.
const _: fn(Hvf) -> Host = |backend| backend;

/// Names the folder with `vmlinux` and `initramfs.cpio`, as `xtask build --guest` makes it.
const GUEST: &str = "SUPERMACHINE_GUEST";
/// The runtime's.
const CMDLINE: &str = "console=ttyAMA0 panic=-1";
/// For anything a guest does: it is emulated, and its host is too.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the balloon takes.
const TAKEN: u64 = 64 << 20;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
/// Takes the folder of [`GUEST`].
type Test = fn(&Path) -> Result;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // A process has one VM, as on macOS.
    arguments.test_threads = Some(1);
    let tests: [(&str, Test); 4] = [
        ("linux::boots_to_its_agent", |guest| boots(guest, 1)),
        ("linux::boots_on_two_processors", |guest| boots(guest, 2)),
        ("linux::gives_memory_back", gives_memory_back),
        ("linux::goes_on_from_a_snapshot", goes_on_from_a_snapshot),
    ];
    let tests = tests.map(|(name, test)| {
        Trial::ignorable_test(name, move || {
            let Some(guest) = std::env::var_os(GUEST) else {
                return Ok(Completion::ignored_with(format!("needs {GUEST}")));
            };
            test(Path::new(&guest)).map_err(failed)?;
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&arguments, tests.into()).exit_code()
}

#[allow(clippy::needless_pass_by_value, reason = "as `map_err` takes it")]
fn failed(error: Box<dyn Error>) -> Failed {
    Failed::from(format!("{error:?}"))
}

fn boots(guest: &Path, processors: u32) -> Result {
    let machine = Machine::boot(guest, processors)?;
    machine.told(|| {
        assert_eq!(machine.ask_agent(false)?.cpus, processors);
        Ok(())
    })?;
    machine.switch_off()
}

fn gives_memory_back(guest: &Path) -> Result {
    let machine = Machine::boot(guest, 1)?;
    machine.told(|| {
        let balloon = machine.running.balloon().ok_or("no balloon")?;
        balloon.set_target(TAKEN)?;
        balloon.wait_for_target(PATIENCE)?;
        assert!(balloon.metrics().discarded_bytes.get() > 0);
        balloon.set_target(0)?;
        balloon.wait_for_target(PATIENCE)?;
        machine.ask_agent(false).map(drop)
    })?;
    machine.switch_off()
}

fn goes_on_from_a_snapshot(guest: &Path) -> Result {
    let machine = Machine::boot(guest, 2)?;
    let snapshot = machine.told(|| {
        machine.ask_agent(false)?;
        machine.running.pause(PATIENCE)?;
        Ok(machine.running.snapshot(machine.place.path(), None)?)
    })?;
    // The process has room for the next only when it is gone.
    let place = machine.stop();
    let machine = Machine::restore(&snapshot, place)?;
    machine.told(|| {
        assert_eq!(machine.ask_agent(false)?.cpus, 2);
        Ok(())
    })?;
    machine.switch_off()
}

/// A running machine, and where its files are.
struct Machine {
    running: RunningVm,
    place: TempDir,
    socket: PathBuf,
}

impl Machine {
    /// One as the runtime makes it, when its agent listens.
    fn boot(guest: &Path, processors: u32) -> Result<Self> {
        let place = TempDir::new()?;
        let (opened, events) = channel();
        let mut config = VmConfig::new(VmConfig::open_kernel(&guest.join("vmlinux"))?);
        config.initramfs = Some(File::open(guest.join("initramfs.cpio"))?);
        config.vcpus = processors;
        config.cmdline = CMDLINE.into();
        config.serial = Some(log(&place)?.into());
        config.disks = vec![disk(&place)?];
        config.console = Some(ConsoleConfig {
            ports: vec![PortConfig {
                name: protocol::console_port_name(protocol::AGENT_CONSOLE_PORT),
            }],
            max_ports: 4,
            events: Box::new(move |event| {
                if event == PortEvent::Opened(protocol::AGENT_CONSOLE_PORT) {
                    // Nobody waits any more after the first.
                    let _ = opened.send(());
                }
            }),
        });
        let socket = place.path().join("first.sock");
        config.vsock = Some(vsock(&socket)?);
        config.balloon = Some(BalloonConfig::default());
        config.rng = true;
        let machine = Self {
            running: Vm::new(config)?.start()?,
            place,
            socket,
        };
        machine.told(|| machine.await_agent(&events))?;
        Ok(machine)
    }

    fn restore(snapshot: &Path, place: TempDir) -> Result<Self> {
        let socket = place.path().join("second.sock");
        let mut config = RestoreConfig::new(File::open(snapshot)?);
        config.serial = Some(log(&place)?.into());
        config.disks = vec![disk(&place)?];
        config.vsock = Some(vsock(&socket)?);
        config.ports = vec![(protocol::AGENT_CONSOLE_PORT, agent_log(&place)?)];
        Ok(Self {
            running: Vm::restore(config)?.start()?,
            place,
            socket,
        })
    }

    fn await_agent(&self, events: &Receiver<()>) -> Result {
        let console = self.running.console().ok_or("no console")?;
        console.attach(protocol::AGENT_CONSOLE_PORT, agent_log(&self.place)?)?;
        events
            .recv_timeout(PATIENCE)
            .map_err(|_| "the agent does not listen".into())
    }

    /// Connects to the agent, as the runtime does; has it switch off, if wanted.
    fn ask_agent(&self, switch_off: bool) -> Result<protocol::Ready> {
        let stream = self.dial()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let stream = tokio::net::UnixStream::from_std(stream)?;
            let client = protocol::AgentClient::new(Client::new(Socket::from(stream)));
            let mut request = protocol::ConnectRequest::new();
            request.protocol_version = protocol::VERSION;
            let mut events = client.connect(with_timeout(0), &request).await?;
            let first = tokio::time::timeout(PATIENCE, events.recv()).await??;
            let Some(protocol::event::Kind::Ready(ready)) = first.and_then(|event| event.kind)
            else {
                return Err("the agent's first event is another than Ready".into());
            };
            assert_eq!(ready.protocol_version, protocol::VERSION);
            if switch_off {
                // The machine's end is the answer.
                let limit = i64::try_from(PATIENCE.as_nanos())?;
                let _ = client
                    .shutdown(with_timeout(limit), &protocol::Empty::new())
                    .await;
            }
            Ok(ready)
        })
    }

    /// A connection to the agent, ready for asynchronous use.
    fn dial(&self) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        writeln!(stream, "CONNECT {}", protocol::AGENT_VSOCK_PORT)?;
        let mut answer = String::new();
        // The agent says nothing before it is asked, so nothing but this line can be in the buffer.
        BufReader::new(&stream).read_line(&mut answer)?;
        if !answer.starts_with("OK ") {
            return Err(format!("the answer to CONNECT is {answer:?}").into());
        }
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn switch_off(self) -> Result {
        self.told(|| self.ask_agent(true).map(drop))?;
        assert_eq!(self.running.wait(), Exit::PowerOff);
        Ok(())
    }

    /// Ends it by force; answers its files.
    fn stop(self) -> TempDir {
        self.running.stop();
        assert_eq!(self.running.wait(), Exit::Stopped);
        self.place
    }

    /// What went wrong, with what the guest has said until then; it is ended.
    fn told<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        act().map_err(|error| {
            self.running.stop();
            let exit = self.running.wait();
            let said = |name| fs::read(self.place.path().join(name)).unwrap_or_default();
            let said = [said("serial"), said("agent")].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            format!("{error}; the machine ended: {exit}; it had said:\n{said}").into()
        })
    }
}

fn log(place: &TempDir) -> Result<File> {
    append(&place.path().join("serial"))
}

fn agent_log(place: &TempDir) -> Result<PortEnds> {
    Ok(PortEnds {
        input: None,
        output: Some(append(&place.path().join("agent"))?.into()),
    })
}

fn append(path: &Path) -> Result<File> {
    Ok(File::options().create(true).append(true).open(path)?)
}

fn vsock(socket: &Path) -> Result<VsockConfig> {
    Ok(VsockConfig {
        cid: 3,
        listener: UnixListener::bind(socket)?,
    })
}

/// A disk of nothing but zeroes.
fn disk(place: &TempDir) -> Result<DiskConfig> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(place.path().join("disk"))?;
    file.set_len(8 << 20)?;
    Ok(DiskConfig {
        files: vec![file],
        read_only: false,
        serial: "disk".into(),
    })
}
