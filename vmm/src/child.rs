//! The VMM process: a program's second life.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::process::{Resource, getrlimit};

use crate::control::{self, ARG0, ARG1, Beginning, LogLevel, Start};
use crate::devices::virtio::{self, block};
use crate::hypervisor::{Ahead, Host, Hypervisor, KICK};
use crate::jail::{self, Filter, Rule, When, allow, allow_if, calls};
use crate::sys::ring::Rings;
use crate::sys::{reactor, threads};
use crate::vcpu;

/// Runs a VMM if this process was executed to be one, and returns its exit status; returns nothing
/// in every other process.
///
/// A program that uses [`VmHandle::spawn`](control::VmHandle::spawn) calls this first in its
/// `main`, before any thread exists and any file is open: a VMM process gives up its privileges
/// and closes what it inherited.
///
/// ```no_run
/// fn main() -> std::process::ExitCode {
///     if let Some(code) = supermachine_vmm::child::main() {
///         return code;
///     }
///     // The program.
///     std::process::ExitCode::SUCCESS
/// }
/// ```
pub fn main() -> Option<ExitCode> {
    let mut args = env::args_os();
    let is = |arg: Option<OsString>, expected: &str| arg.is_some_and(|arg| arg == expected);
    if !is(args.next(), ARG0) || !is(args.next(), ARG1) {
        return None;
    }
    let level = args
        .nth(1)
        .and_then(|level| LogLevel::parse(level.to_str()?))
        .unwrap_or(LogLevel::Warn);
    let beginning = args.next();
    Some(run(level, beginning.as_deref()))
}

/// All that a VMM process does from its confinement to its end. Each thread is left a part of it
/// when it starts, and the first one when the VM runs.
const PROCESS: Filter = Filter {
    name: "boot",
    tables: &[
        BOOT,
        threads::EVERY,
        threads::STARTING,
        control::TALK,
        control::SAVE,
        reactor::WAITING,
        virtio::STREAMS,
        block::FILE,
        vcpu::RUNNING,
    ],
};

/// What it takes to make a VM.
const BOOT: &[Rule] = &[
    // KVM's own requests.
    allow_if(calls::SYS_ioctl, &[When::Masked(1, 0xff00, 0xae00)]),
    allow(calls::SYS_epoll_create1),
    allow(calls::SYS_eventfd2),
    allow(calls::SYS_timerfd_create),
    // Disks' rings were made before; files, limits and the end of their making are left.
    allow_if(
        calls::SYS_io_uring_register,
        &[
            When::Is(1, 2),  // IORING_REGISTER_FILES
            When::Is(1, 4),  // IORING_REGISTER_EVENTFD
            When::Is(1, 11), // IORING_REGISTER_RESTRICTIONS
            When::Is(1, 12), // IORING_REGISTER_ENABLE_RINGS
            When::Is(1, 19), // IORING_REGISTER_IOWQ_MAX_WORKERS
        ],
    ),
    allow(calls::SYS_getpeername),
    allow(calls::SYS_getsockopt),
    allow_if(calls::SYS_rt_sigaction, &[When::Is(0, KICK as u32)]),
];

/// What a VM has open with all devices, sixteen console ports and some connections.
const LEAST_FILES: u64 = 128;

/// The highest descriptor of a VM with all devices and 63 console ports, about.
const MOST_FILES: i32 = 511;

/// The most rings that are made for disks; those beyond do one request at a time.
const MOST_RINGS: usize = 16;

/// The filter of each kind of thread, the first for the time before the VM runs.
pub fn filters() -> [&'static Filter; 5] {
    [
        &PROCESS,
        &control::CONTROL,
        &virtio::DEVICES,
        &block::DISK,
        &vcpu::VCPU,
    ]
}

fn run(level: LogLevel, beginning: Option<&OsStr>) -> ExitCode {
    let confined = confine(beginning);
    let socket = match control_socket() {
        Ok(socket) => socket,
        // There is nobody to tell.
        Err(_) => return ExitCode::FAILURE,
    };
    match confined {
        Ok(start) => control::serve(socket, level, start),
        Err(error) => control::give_up(&socket, &*error),
    }
}

/// What a VMM needs and will not get at once it is confined, is opened before.
fn confine(beginning: Option<&OsStr>) -> Result<Start, Box<dyn std::error::Error>> {
    let Beginning {
        jail: policy,
        own_network,
        disks,
    } = match beginning {
        Some(text) => serde_json::from_slice(text.as_bytes())?,
        None => Beginning::default(),
    };
    env::set_current_dir("/")?;
    jail::close_inherited()?;
    make_room_for_files()?;
    let hypervisor = Host::open();
    let rings = Rings::make(disks.min(MOST_RINGS));
    let mut hypervisor = hypervisor.map(Ahead::new);
    let begin = || {
        if let Ok(hypervisor) = &mut hypervisor {
            hypervisor.begin();
        }
    };
    let missing = jail::enter_beside(&policy, &PROCESS, own_network, begin)?;
    Ok(Start {
        hypervisor,
        rings,
        missing,
    })
}

/// Has Linux make its table of this process's files as large as it gets with all devices. When
/// threads share it, each doubling waits for a grace period of the kernel's (RCU), some 10 ms.
///
/// A limit that is too low is refused now, not found by the guest, whose device would fail.
fn make_room_for_files() -> Result<(), String> {
    match getrlimit(Resource::Nofile).maximum {
        Some(most) if most < LEAST_FILES => Err(format!(
            "The limit of open files is {most}, expected {LEAST_FILES} or more"
        )),
        _ => {
            // Where the limit is lower, the table stays smaller.
            let _ = rustix::io::fcntl_dupfd_cloexec(io::stdin(), MOST_FILES);
            Ok(())
        }
    }
}

/// The control socket is standard input. It moves away from there, so that nothing reads it by
/// mistake; the descriptor 0 that stays holds the socket open no longer than the process lives.
fn control_socket() -> io::Result<UnixStream> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Refuses what is no socket.
    socket.peer_addr()?;
    Ok(socket)
}
