//! Watches over one VMM process: starts it, reads what it says, reaps it.
//!
//! The child is treated as its guest's. What it sends is bounded in size and number and checked;
//! when it breaks the rules it is killed, and the VM's end says why.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::birth::{self, Born};
use super::client::ControlError;
use super::frame::{self, FROM_CHILD, FROM_PARENT, FrameError};
use super::log::{self, Budget};
use super::membership::Joining;
use super::message::{Answer, Body, ErrorMessage, Event, Exit, Request, ToParent, VERSION};
use super::spec::SpawnConfig;
use super::{Preparation, describe, last_words};
use crate::jail::{Missing, SECCOMP_EXIT_STATUS};

/// From execution to greeting, and the most that one write to the child may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Port events that may come at once, and the time after which one more may.
const PORT_EVENTS: u32 = 4096;
const PORT_EVENT_INTERVAL: Duration = Duration::from_millis(1);

/// What handle and supervisor share.
pub(super) struct Shared {
    pub(super) pid: u32,
    /// Layers of its confinement that the host lacks.
    pub(super) missing: Vec<Missing>,
    process: Mutex<Process>,
    /// Held for one whole frame.
    writer: Mutex<UnixStream>,
    state: Mutex<State>,
    /// `State::exit` is there.
    pub(super) ended: Condvar,
}

enum Process {
    Running(Born),
    Reaped(ExitStatus),
}

#[derive(Default)]
pub(super) struct State {
    next_id: u64,
    waiting: HashMap<u64, SyncSender<Result<Answer, ErrorMessage>>>,
    /// Ports the console was made with; 0 before a boot.
    pub(super) max_ports: u32,
    pub(super) exit: Option<Exit>,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Sends a request and waits for its answer.
    pub(super) fn call(
        &self,
        request: &'static str,
        body: Body,
        files: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Answer, ControlError> {
        let (sender, answer) = mpsc::sync_channel(1);
        let id = {
            let mut state = self.state();
            if let Some(exit) = &state.exit {
                return Err(ControlError::Ended(exit.clone()));
            }
            let id = state.next_id;
            state.next_id += 1;
            state.waiting.insert(id, sender);
            id
        };
        let sent = frame::send(
            &lock(&self.writer),
            &Request { id, body },
            files,
            FROM_PARENT,
        );
        if let Err(error) = sent {
            self.state().waiting.remove(&id);
            return Err(match error {
                // Perhaps within a frame: there is no going on from here.
                FrameError::Socket(_) | FrameError::Cut => ControlError::Ended(self.end()),
                error => ControlError::Request {
                    request,
                    found: error.to_string(),
                },
            });
        }
        match answer.recv_timeout(timeout) {
            Ok(result) => Ok(result?),
            Err(RecvTimeoutError::Timeout) => {
                self.state().waiting.remove(&id);
                Err(ControlError::Timeout {
                    request,
                    after: timeout,
                })
            }
            Err(RecvTimeoutError::Disconnected) => Err(ControlError::Ended(self.end())),
        }
    }

    /// A [`call`](Self::call) whose answer says nothing more.
    pub(super) fn done(
        &self,
        request: &'static str,
        body: Body,
        files: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), ControlError> {
        match self.call(request, body, files, timeout)? {
            Answer::Done => Ok(()),
            Answer::BalloonStats(_) => Err(self.wrong_answer(request)),
        }
    }

    /// Ends a child that answered something else than it was asked.
    pub(super) fn wrong_answer(&self, request: &'static str) -> ControlError {
        self.reap();
        ControlError::Ended(Exit::Fault(format!("wrong kind of answer to {request}")))
    }

    /// Kills the process unless it has ended, and says how the VM ended.
    pub(super) fn end(&self) -> Exit {
        let status = self.reap();
        // The supervisor may know better, if it was faster.
        let exit = self.state().exit.clone();
        exit.unwrap_or_else(|| exit_of(status))
    }

    /// Kills and reaps the process; its status when that was done before.
    pub(super) fn reap(&self) -> ExitStatus {
        let mut process = lock(&self.process);
        let status = match &mut *process {
            Process::Reaped(status) => return *status,
            Process::Running(child) => child.kill_and_wait(),
        };
        *process = Process::Reaped(status);
        status
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.signal(), status.code()) {
        (Some(signal), _) => Exit::Killed { signal },
        (None, Some(SECCOMP_EXIT_STATUS)) => {
            Exit::Fault("The VMM process made a forbidden system call".to_owned())
        }
        (None, code) => Exit::Vanished {
            status: code.unwrap_or_default(),
        },
    }
}

/// A panic elsewhere doesn't make these values wrong: each is changed in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The supervisor thread, from the child's start to its end.
pub(super) fn supervise(
    config: &SpawnConfig,
    preparation: Option<Preparation>,
    on_event: &dyn Fn(Event),
    started: &SyncSender<Result<Arc<Shared>, ControlError>>,
) {
    // The receiver waits for exactly this message.
    let (shared, socket, stderr) = match start(config, preparation) {
        Ok((shared, socket, stderr)) => {
            let _ = started.send(Ok(Arc::clone(&shared)));
            (shared, socket, stderr)
        }
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let told = Listener::new(&shared, on_event).listen(&socket);
    let status = shared.reap();
    let said = stderr.map(last_words::read).unwrap_or_default();
    if !said.is_empty() {
        tracing::warn!(vm = config.name, said, "last words of the VMM process");
    }
    let exit = told
        .or_else(|| last_words::forbidden(status, &said).map(Exit::Fault))
        .unwrap_or_else(|| exit_of(status));
    {
        let mut state = shared.state();
        state.exit = Some(exit.clone());
        state.waiting.clear();
        shared.ended.notify_all();
    }
    on_event(Event::Ended(exit));
}

/// Starts the child and waits for its greeting.
fn start(
    config: &SpawnConfig,
    preparation: Option<Preparation>,
) -> Result<(Arc<Shared>, UnixStream, Option<OwnedFd>), ControlError> {
    let (ours, theirs) = UnixStream::pair().map_err(ControlError::Socket)?;
    ours.set_write_timeout(Some(PATIENCE))
        .map_err(ControlError::Socket)?;
    let joining = Joining::begin(config).map_err(|source| ControlError::Thread {
        name: config.name.clone(),
        source,
    })?;
    let network = preparation.and_then(Preparation::into_network);
    let mut child = birth::spawn(config, network, theirs)?;
    let moving = joining
        .filter(|_| !child.accounted)
        .map(|joining| joining.put(child.pid));
    let stderr = child.stderr.take();
    let missing = match admit(config, &ours) {
        Ok(missing) => missing,
        Err(error) => {
            let status = child.kill_and_wait();
            let said = stderr.map(last_words::read).unwrap_or_default();
            return Err(match last_words::forbidden(status, &said) {
                Some(found) => ControlError::Greeting {
                    exe: config.exe.clone(),
                    found,
                },
                None => error,
            });
        }
    };
    // While the child confined itself. What it is asked for from now on is to be its cgroups'.
    if let Some(moving) = moving {
        // A panic was told by the panic hook.
        let _ = moving.join();
    }
    let writer = match ours.try_clone() {
        Ok(writer) => writer,
        Err(error) => {
            child.kill_and_wait();
            return Err(ControlError::Socket(error));
        }
    };
    let shared = Shared {
        pid: child.pid,
        missing,
        process: Mutex::new(Process::Running(child)),
        writer: Mutex::new(writer),
        state: Mutex::default(),
        ended: Condvar::new(),
    };
    Ok((Arc::new(shared), ours, stderr))
}

/// What a child must pass before it counts as started. Answers what it lacks.
fn admit(config: &SpawnConfig, socket: &UnixStream) -> Result<Vec<Missing>, ControlError> {
    socket
        .set_read_timeout(Some(PATIENCE))
        .map_err(ControlError::Socket)?;
    let found = match frame::receive(socket, FROM_CHILD) {
        Ok(Some((
            ToParent::Hello {
                version: VERSION,
                missing,
            },
            _,
        ))) => {
            socket
                .set_read_timeout(None)
                .map_err(ControlError::Socket)?;
            return Ok(told(config, missing));
        }
        Ok(Some((ToParent::Hello { version, .. }, _))) => {
            format!("version {version} of the messages, {VERSION} expected")
        }
        Ok(Some((ToParent::Event(Event::Ended(Exit::Fault(reason))), _))) => {
            log::clean(&reason, log::MAX_LINE)
        }
        Ok(Some(_)) => "another message".to_owned(),
        Ok(None) => "it closed the control socket".to_owned(),
        Err(FrameError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
            format!("nothing within {PATIENCE:?}")
        }
        Err(error) => error.to_string(),
    };
    Err(ControlError::Greeting {
        exe: config.exe.clone(),
        found,
    })
}

/// Writes down what a child lacks. At this point it has not met its guest yet, and is believed.
fn told(config: &SpawnConfig, missing: Vec<Missing>) -> Vec<Missing> {
    for Missing { layer, reason } in &missing {
        tracing::info!(
            vm = config.name,
            %layer,
            reason = log::clean(reason, log::MAX_LINE),
            "the VMM process lacks a layer of its confinement"
        );
    }
    missing
}

/// Reads the child's messages and holds it to the rules.
struct Listener<'a> {
    shared: &'a Shared,
    on_event: &'a dyn Fn(Event),
    log: Budget,
    ports: Budget,
}

impl<'a> Listener<'a> {
    fn new(shared: &'a Shared, on_event: &'a dyn Fn(Event)) -> Self {
        let now = Instant::now();
        Self {
            shared,
            on_event,
            // An honest child keeps to this itself; a little more forgives its clock.
            log: Budget::new(log::BURST * 2, log::INTERVAL / 2, now),
            ports: Budget::new(PORT_EVENTS, PORT_EVENT_INTERVAL, now),
        }
    }

    /// Until the child ends or breaks a rule: how the VM ended, if that is known.
    fn listen(mut self, socket: &UnixStream) -> Option<Exit> {
        loop {
            let message = match frame::receive(socket, FROM_CHILD) {
                Ok(Some((message, _))) => message,
                // It died between two frames or within one; its status says how.
                Ok(None) | Err(FrameError::Cut | FrameError::Socket(_)) => return None,
                Err(error) => return Some(Exit::Fault(describe(&error))),
            };
            let kept = match message {
                ToParent::Hello { .. } => Err("a second greeting".to_owned()),
                ToParent::Reply { id, result } => self.reply(id, result),
                ToParent::Event(Event::Ended(exit)) => return Some(last_words(exit)),
                ToParent::Event(event) => self.event(event),
            };
            if let Err(broken) = kept {
                return Some(Exit::Fault(format!("VMM process sent {broken}")));
            }
        }
    }

    fn reply(&self, id: u64, result: Result<Answer, ErrorMessage>) -> Result<(), String> {
        let mut state = self.shared.state();
        if id >= state.next_id {
            return Err(format!("a reply to request {id}, which was never made"));
        }
        // Nobody waits for it any more when its deadline has passed.
        if let Some(waiting) = state.waiting.remove(&id) {
            let result = result.map_err(|message| ErrorMessage {
                text: log::clean(&message.text, log::MAX_LINE),
                ..message
            });
            // The channel has room for one, and this is the one.
            let _ = waiting.try_send(result);
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), String> {
        let event = match event {
            Event::PortOpened { port }
            | Event::PortClosed { port }
            | Event::InputEnded { port } => {
                let max_ports = self.shared.state().max_ports;
                if port >= max_ports {
                    return Err(format!("an event of port {port} of {max_ports}"));
                }
                if self.ports.take(Instant::now()).is_none() {
                    return Err("port events without end".to_owned());
                }
                event
            }
            Event::DeviceFault { device, reason } => {
                if self.log.take(Instant::now()).is_none() {
                    return Ok(());
                }
                Event::DeviceFault {
                    device: log::clean(&device, log::MAX_NAME),
                    reason: log::clean(&reason, log::MAX_LINE),
                }
            }
            Event::Log {
                level,
                target,
                text,
            } => {
                if self.log.take(Instant::now()).is_none() {
                    return Ok(());
                }
                Event::Log {
                    level,
                    target: log::clean(&target, log::MAX_NAME),
                    text: log::clean(&text, log::MAX_LINE),
                }
            }
            // The listener ends with it.
            Event::Ended(_) => return Ok(()),
        };
        (self.on_event)(event);
        Ok(())
    }
}

/// What a child may say of its end. How a process died is not for itself to tell.
fn last_words(exit: Exit) -> Exit {
    match exit {
        Exit::PowerOff | Exit::Reset | Exit::TripleFault | Exit::Stopped => exit,
        Exit::Fault(reason) => Exit::Fault(log::clean(&reason, log::MAX_LINE)),
        Exit::Killed { .. } | Exit::Vanished { .. } => {
            Exit::Fault("VMM process reported its own death".to_owned())
        }
    }
}
