//! A container in its virtual machine: the verbs containerd knows, as a state machine.
//!
//! [`Sandbox`] is one machine and what runs in it. Its state is behind one lock that is held for
//! moments only, never across a call to the guest; each call to the guest has a deadline; what the
//! host knows by itself (state, exit, deletion) it answers by itself, so a guest that hangs holds up
//! nobody. What happened is told in order through one channel of [`Event`]s.
//!
//! The pid told to callers is that of the machine's process: there is no other on the host.

mod changes;
mod create;
mod error;
mod guest_log;
mod machine;
mod pause;
mod ports;
mod process;
mod pump;
mod resources;
mod verbs;
mod vm;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::{mpsc, watch};

use crate::acquire::stdio::Held;
use crate::agent::Agent;
use crate::events::{Event, Exit};
use crate::hooks::Hooks;
use crate::request;
use machine::{Launcher, Machine, Timeouts};
use pause::Pause;
use ports::Ports;
use process::Process;

pub use error::{Error, Kind};
pub use process::Status;
/// What a container uses, in the numbers of its guest's cgroup. They are the guest's to choose.
pub use supermachine_protocol::{IoStats, StatsResponse as Stats};
pub use vm::clean_up;

/// Exit status of a process whose end nobody saw, as containerd has it.
const STATUS_UNKNOWN: u32 = 255;
/// Exit status of a process that SIGKILL ended.
const STATUS_KILLED: u32 = 137;

/// One virtual machine and the container in it. Clones are handles of the same one.
#[derive(Clone)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").finish_non_exhaustive()
    }
}

/// What [`Sandbox::state`] tells of a process.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The machine's process.
    pub pid: u32,
    /// Where the process is in its life.
    pub status: Status,
    /// Its streams, as asked for.
    pub stdio: request::Stdio,
    /// How it ended, if it did.
    pub exit: Option<Exit>,
}

struct Inner {
    launcher: Box<dyn Launcher>,
    timeouts: Timeouts,
    /// First and last console port for stdio.
    stdio_ports: (u32, u32),
    events: mpsc::UnboundedSender<Event>,
    slot: Mutex<Slot>,
    /// Whether a create is under way.
    creating: watch::Sender<bool>,
    /// Whether what is being created is wanted no more.
    ending: watch::Sender<bool>,
}

/// The sandbox's place for its container.
enum Slot {
    Empty,
    /// A create is under way for this id.
    Reserved(String),
    Taken(Box<Container>),
}

/// A container and the machine it lives in.
struct Container {
    /// containerd's.
    namespace: String,
    id: String,
    bundle: PathBuf,
    rootfs: Vec<request::Mount>,
    hooks: Hooks,
    vm: Vm,
    /// By exec id; the init process's is empty.
    processes: HashMap<String, Entry>,
    ports: Ports,
    pause: Pause,
    /// What it last used.
    stats: Option<Stats>,
}

/// The machine, as far as the verbs need it.
#[derive(Clone)]
struct Vm {
    machine: Arc<dyn Machine>,
    agent: Agent,
    /// Why it ended, once it has.
    ended: watch::Receiver<Option<String>>,
}

/// A process and what the host holds for it.
struct Entry {
    process: Process,
    /// What an exec is to run; taken at its start.
    exec: Option<request::Exec>,
    /// Console ports attached for it.
    ports: Vec<u32>,
    held: Held,
    /// Terminal size asked for before there was a terminal.
    size: Option<(u32, u32)>,
}

impl Entry {
    fn new(process: Process, exec: Option<request::Exec>) -> Self {
        Self {
            process,
            exec,
            ports: Vec::new(),
            held: Held::default(),
            size: None,
        }
    }
}

impl Inner {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A panic elsewhere does not make the state wrong: every change is a single step.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the container called `id`.
    fn with<R>(
        &self,
        id: &str,
        f: impl FnOnce(&mut Container) -> Result<R, Error>,
    ) -> Result<R, Error> {
        match &mut *self.slot() {
            Slot::Taken(container) if container.id == id => f(container),
            _ => Err(Error::not_found("container not created")),
        }
    }

    /// Runs `f` on a process and its container's id.
    fn with_process<R>(
        &self,
        id: &str,
        exec_id: &str,
        f: impl FnOnce(&mut Entry, &Vm) -> Result<R, Error>,
    ) -> Result<R, Error> {
        self.with(id, |container| {
            let Container { processes, vm, .. } = container;
            let entry = processes
                .get_mut(exec_id)
                .ok_or_else(|| Error::not_found(format!("process does not exist {exec_id}")))?;
            f(entry, vm)
        })
    }

    /// Tells the world. Nobody listening any more is no reason to fail.
    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }
}

impl Container {
    fn pid(&self) -> u32 {
        self.vm.machine.pid()
    }
}

/// An end nobody saw.
fn unknown_exit() -> Exit {
    Exit {
        status: STATUS_UNKNOWN,
        at: SystemTime::now(),
    }
}

fn killed_exit() -> Exit {
    Exit {
        status: STATUS_KILLED,
        at: SystemTime::now(),
    }
}
