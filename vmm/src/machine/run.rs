//! The vCPU threads of a VM, from start to end.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::devices::{Devices, Handles};
use crate::error::{Error, PauseError};
use crate::exit::Exit;
use crate::hypervisor::{HypervisorError, Kicker, Vcpu, VcpuSeed};
use crate::sys::threads;
use crate::vcpu::{self, Buses, Gate};

/// How long to wait for vCPUs to come out before they are kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// The state a seed's vCPU starts in.
type Setup<S> = <<S as VcpuSeed>::Vcpu as Vcpu>::Setup;

/// What vCPU threads are started from.
pub(super) struct Parts<S: VcpuSeed> {
    pub(super) vcpus: Vec<(S, Setup<S>)>,
    pub(super) buses: Arc<Buses>,
    pub(super) devices: Devices,
    pub(super) handles: Handles,
    /// What must outlive the vCPUs: the VM and its memory.
    pub(super) keep: Box<dyn Any + Send + Sync>,
}

/// A VM whose vCPUs run, or have run.
pub(super) struct Running {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    pub(super) handles: Handles,
    _keep: Box<dyn Any + Send + Sync>,
}

/// What vCPU threads and their owner share.
struct Shared {
    /// vCPUs stop before they enter the guest again.
    stop: AtomicBool,
    kickers: Vec<Box<dyn Fn() + Send + Sync>>,
    devices: Devices,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// How the VM ended, from the first vCPU that knew.
    exit: Option<Exit>,
    /// vCPUs that have not come out for good.
    running: usize,
    /// Devices have stopped after the last vCPU.
    ended: bool,
    /// vCPUs wait outside of the guest, or are to.
    paused: bool,
    /// Those that do.
    parked: usize,
}

/// Starts a thread for each vCPU. All are bound before any runs.
pub(super) fn start<S: VcpuSeed>(parts: Parts<S>) -> Result<Running, Error> {
    let count = parts.vcpus.len();
    let kickers = parts
        .vcpus
        .iter()
        .map(|(seed, _)| {
            let kicker = seed.kicker();
            Box::new(move || kicker.kick()) as Box<dyn Fn() + Send + Sync>
        })
        .collect();
    let state = State {
        exit: None,
        running: count,
        ended: count == 0,
        paused: false,
        parked: 0,
    };
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        kickers,
        devices: parts.devices,
        state: Mutex::new(state),
        changed: Condvar::new(),
    });
    let (report, reports) = mpsc::channel();
    let mut starts = Vec::with_capacity(count);
    let mut threads = Vec::with_capacity(count);
    let mut failed = None;
    for (index, (seed, setup)) in parts.vcpus.into_iter().enumerate() {
        let (start, go) = mpsc::channel();
        let thread = Thread {
            shared: Arc::clone(&shared),
            report: report.clone(),
            go,
        };
        let buses = Arc::clone(&parts.buses);
        let name = format!("vcpu{index}");
        let spawned =
            threads::builder(name.clone()).spawn(move || thread.run(seed, &setup, &buses));
        match spawned {
            Ok(handle) => {
                threads.push(handle);
                starts.push(start);
            }
            Err(source) => {
                shared.lock().running -= count - index;
                failed = Some(Error::Thread { name, source });
                break;
            }
        }
    }
    drop(report);
    for _ in &starts {
        match reports.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed = Some(error.into()),
            // Every thread reports before it can end.
            Err(mpsc::RecvError) => break,
        }
    }
    let running = Running {
        shared,
        threads: Mutex::new(threads),
        handles: parts.handles,
        _keep: parts.keep,
    };
    match failed {
        // Dropping the senders and `running` ends the threads.
        Some(error) => Err(error),
        None => {
            for start in starts {
                // The thread waits for it.
                let _ = start.send(());
            }
            Ok(running)
        }
    }
}

struct Thread {
    shared: Arc<Shared>,
    report: Sender<Result<(), HypervisorError>>,
    go: Receiver<()>,
}

impl Thread {
    fn run<S: VcpuSeed>(self, seed: S, setup: &Setup<S>, buses: &Buses) {
        // Counts this vCPU out whatever happens: also when a device panics below it.
        let mut out = CountOut {
            shared: &self.shared,
            exit: None,
        };
        let mut vcpu = match seed
            .bind()
            .and_then(|mut vcpu| vcpu.boot(setup).map(|()| vcpu))
        {
            Ok(vcpu) => vcpu,
            Err(error) => {
                out.exit = Some(Exit::Stopped);
                let _ = self.report.send(Err(error));
                return;
            }
        };
        // Its state is set; all that is left is to run.
        threads::narrow(&vcpu::VCPU);
        let _ = self.report.send(Ok(()));
        out.exit = match self.go.recv() {
            Ok(()) => None,
            Err(mpsc::RecvError) => Some(Exit::Stopped),
        };
        if out.exit.is_none() {
            out.exit = Some(vcpu::run(&mut vcpu, buses, &*self.shared));
        }
        // The vCPU goes on its own thread, before it is counted out.
        drop(vcpu);
    }
}

/// Counts a vCPU out when dropped.
struct CountOut<'a> {
    shared: &'a Shared,
    exit: Option<Exit>,
}

impl Drop for CountOut<'_> {
    fn drop(&mut self) {
        let panicked = || Exit::Fault("The VMM panicked on a vCPU thread".into());
        let exit = self.exit.take().unwrap_or_else(panicked);
        self.shared.end(exit);
        let last = {
            let mut state = self.shared.lock();
            state.running -= 1;
            state.running == 0
        };
        if last {
            // Devices stop before anybody hears of the end: what they report belongs before it.
            self.shared.devices.shut_down();
            self.shared.lock().ended = true;
        }
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how the VM ends, unless somebody has, and brings all vCPUs out.
    fn end(&self, exit: Exit) {
        self.lock().exit.get_or_insert(exit);
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
        self.changed.notify_all();
    }

    fn kick(&self) {
        for kick in &self.kickers {
            kick();
        }
    }
}

impl Gate for Shared {
    fn is_closed(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn rest(&self) -> bool {
        let mut state = self.lock();
        if !state.paused || state.exit.is_some() {
            return false;
        }
        state.parked += 1;
        self.changed.notify_all();
        while state.paused && state.exit.is_none() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        true
    }
}

impl Running {
    /// Stops every vCPU outside of the guest and waits until all have come out.
    pub(super) fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        state.paused = true;
        self.shared.kick();
        loop {
            if state.exit.is_some() {
                return Err(PauseError::Ended);
            }
            if state.parked == state.running {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                state.paused = false;
                self.shared.changed.notify_all();
                return Err(PauseError::Busy {
                    inside: state.running - state.parked,
                    limit,
                });
            }
            // A kick may be lost.
            let (unlocked, timeout) = self
                .shared
                .changed
                .wait_timeout(state, KICK_AGAIN.min(deadline - now))
                .unwrap_or_else(PoisonError::into_inner);
            state = unlocked;
            if timeout.timed_out() {
                self.shared.kick();
            }
        }
    }

    /// Lets vCPUs go on.
    pub(super) fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        self.shared.end(Exit::Stopped);
    }

    pub(super) fn wait(&self) -> Exit {
        let mut state = self.shared.lock();
        while !state.ended {
            if state.exit.is_none() || state.running == 0 {
                let changed = &self.shared.changed;
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            // The end is decided: a kick may be lost, so it is repeated until all have come out.
            let (unlocked, timeout) = self
                .shared
                .changed
                .wait_timeout(state, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            state = unlocked;
            if timeout.timed_out() {
                self.shared.kick();
            }
        }
        state.exit.clone().unwrap_or(Exit::Stopped)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        self.wait();
        let threads = self
            .threads
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // A panic has been reported as the VM's exit.
            let _ = thread.join();
        }
    }
}
