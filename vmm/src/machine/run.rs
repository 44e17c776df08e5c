//! The vCPU threads of a VM, from start to end.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::devices::{Devices, Handles};
use crate::devices::virtio::block::FillError;
use crate::error::{Error, PauseError, SaveError};
use crate::exit::Exit;
use crate::hypervisor::{HypervisorError, Kicker, Vcpu, VcpuSeed};
use crate::memory::GuestMemory;
use crate::sys::threads;
use crate::vcpu::{self, Buses, Gate};

/// How long to wait for vCPUs to come out before they are kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// What vCPU threads are started from.
pub(super) struct Parts<S: VcpuSeed> {
    pub(super) vcpus: Vec<(S, Begin<S::Vcpu>)>,
    pub(super) buses: Arc<Buses>,
    pub(super) devices: Devices,
    pub(super) handles: Handles,
    /// Guest RAM, and what the hypervisor holds of the VM: both must outlive the vCPUs.
    pub(super) memory: GuestMemory,
    pub(super) save_vm: SaveVm,
    /// Tells the hypervisor that all are bound.
    pub(super) bound: Box<dyn FnOnce() -> Result<(), HypervisorError>>,
}

/// The state of a vCPU before its first instruction here.
pub(super) enum Begin<V: Vcpu> {
    /// It enters the kernel, or waits for another vCPU to start it.
    Boot(V::Setup),
    /// It goes on.
    Restore(Box<V::State>),
}

impl<V: Vcpu> Begin<V> {
    fn apply(&self, vcpu: &mut V) -> Result<(), HypervisorError> {
        match self {
            Self::Boot(setup) => vcpu.boot(setup),
            Self::Restore(state) => {
                vcpu.restore(state)?;
                vcpu.resumed();
                Ok(())
            }
        }
    }
}

/// Reads what the hypervisor holds of the VM beside its vCPUs; owns the VM.
pub(super) type SaveVm = Box<dyn Fn() -> Result<Vec<u8>, HypervisorError> + Send + Sync>;

/// A VM whose vCPUs run, or have run.
pub(super) struct Running {
    pub(super) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    pub(super) handles: Handles,
    // The VM goes before the memory it maps.
    pub(super) save_vm: SaveVm,
    pub(super) memory: GuestMemory,
}

/// What vCPU threads and their owner share.
pub(super) struct Shared {
    /// vCPUs stop before they enter the guest again.
    stop: AtomicBool,
    kickers: Vec<Box<dyn Fn() + Send + Sync>>,
    pub(super) devices: Devices,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// How the VM ended, from the first vCPU that knew.
    exit: Option<Exit>,
    /// Hears of the end.
    observer: Option<Box<dyn FnOnce() + Send>>,
    /// vCPUs that have not come out for good.
    running: usize,
    /// Devices have stopped after the last vCPU.
    ended: bool,
    /// vCPUs wait outside of the guest, or are to.
    paused: bool,
    /// Those that do.
    parked: usize,
    /// The VM is being saved: a pause lasts until that is done.
    saving: bool,
    /// The vCPUs' states, as far as they were asked for and have answered.
    saved: Vec<Option<Result<Vec<u8>, HypervisorError>>>,
}

/// Starts a thread for each vCPU. All are bound before any gets its state, and have it before any
/// runs.
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
        observer: None,
        running: count,
        ended: count == 0,
        paused: false,
        parked: 0,
        saving: false,
        saved: Vec::new(),
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
    for (index, (seed, begin)) in parts.vcpus.into_iter().enumerate() {
        let (start, go) = mpsc::channel();
        let thread = Thread {
            index,
            shared: Arc::clone(&shared),
            report: report.clone(),
            go,
        };
        let buses = Arc::clone(&parts.buses);
        let name = format!("vcpu{index}");
        let spawned = threads::builder(name.clone()).spawn(move || thread.run(seed, begin, &buses));
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
    let all = || {
        let mut result = Ok(());
        for _ in &starts {
            match reports.recv() {
                Ok(report) => result = result.and(report),
                // Every thread reports before it can end.
                Err(mpsc::RecvError) => break,
            }
        }
        result
    };
    let go = || {
        for start in &starts {
            // The thread waits for it.
            let _ = start.send(());
        }
    };
    let bound = all().and_then(|()| (parts.bound)());
    if failed.is_none() {
        let ready = bound.and_then(|()| {
            go();
            all()
        });
        failed = ready.err().map(Error::from);
    }
    let running = Running {
        shared,
        threads: Mutex::new(threads),
        handles: parts.handles,
        save_vm: parts.save_vm,
        memory: parts.memory,
    };
    if let Some(error) = failed {
        // Ends threads that wait for a word that does not come, before `running` waits for them.
        drop(starts);
        return Err(error);
    }
    // Devices of a restored VM work on its memory: not before all else has come well.
    running.shared.devices.begin();
    go();
    Ok(running)
}

struct Thread {
    index: usize,
    shared: Arc<Shared>,
    report: Sender<Result<(), HypervisorError>>,
    go: Receiver<()>,
}

impl Thread {
    fn run<S: VcpuSeed>(self, seed: S, begin: Begin<S::Vcpu>, buses: &Buses) {
        // Counts this vCPU out whatever happens: also when a device panics below it.
        let mut out = CountOut {
            shared: &self.shared,
            exit: None,
        };
        let Some(mut vcpu) = self.turn(seed.bind()) else {
            out.exit = Some(Exit::Stopped);
            return;
        };
        let applied = begin.apply(&mut vcpu);
        // Its state is set; all that is left is to run.
        drop(begin);
        threads::narrow(&vcpu::VCPU);
        out.exit = Some(match self.turn(applied) {
            Some(()) => {
                let post = Post {
                    shared: &self.shared,
                    index: self.index,
                };
                vcpu::run(&mut vcpu, buses, &post)
            }
            None => Exit::Stopped,
        });
        // The vCPU goes on its own thread, before it is counted out.
        drop(vcpu);
    }

    /// Reports what it has come to, and waits for the others; nothing if it is not to go on.
    fn turn<T>(&self, result: Result<T, HypervisorError>) -> Option<T> {
        match result {
            Ok(done) => {
                let _ = self.report.send(Ok(()));
                self.go.recv().ok().map(|()| done)
            }
            Err(error) => {
                let _ = self.report.send(Err(error));
                None
            }
        }
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
        let observer = {
            let mut state = self.lock();
            state.exit.get_or_insert(exit);
            state.observer.take()
        };
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
        self.changed.notify_all();
        if let Some(tell) = observer {
            tell();
        }
    }

    fn kick(&self) {
        for kick in &self.kickers {
            kick();
        }
    }
}

/// The gate as one vCPU meets it.
struct Post<'a> {
    shared: &'a Shared,
    index: usize,
}

impl Gate for Post<'_> {
    fn is_closed(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    fn rest(&self, save: &mut dyn FnMut() -> Result<Vec<u8>, HypervisorError>) -> bool {
        let shared = self.shared;
        let mut state = shared.lock();
        if !state.paused || state.exit.is_some() {
            return false;
        }
        state.parked += 1;
        shared.changed.notify_all();
        while state.paused && state.exit.is_none() {
            if matches!(state.saved.get(self.index), Some(None)) {
                drop(state);
                let saved = save();
                state = shared.lock();
                if let Some(place) = state.saved.get_mut(self.index) {
                    *place = Some(saved);
                }
                shared.changed.notify_all();
                continue;
            }
            let changed = &shared.changed;
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        true
    }
}

/// A pause that cannot end, while a VM is saved.
pub(super) struct Held<'a>(&'a Shared);

impl Held<'_> {
    /// The state of every vCPU, in order.
    pub(super) fn save_vcpus(&self) -> Result<Vec<Vec<u8>>, SaveError> {
        let mut state = self.0.lock();
        state.saved = self.0.kickers.iter().map(|_| None).collect();
        self.0.changed.notify_all();
        while state.exit.is_none() && state.saved.iter().any(Option::is_none) {
            let changed = &self.0.changed;
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let saved = std::mem::take(&mut state.saved);
        drop(state);
        let vcpus = saved
            .into_iter()
            .map(|saved| Ok(saved.ok_or(SaveError::Ended)??));
        vcpus.collect()
    }

    /// Whether the VM has not ended meanwhile.
    pub(super) fn check(&self) -> Result<(), SaveError> {
        match self.0.lock().exit {
            Some(_) => Err(SaveError::Ended),
            None => Ok(()),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.lock().saving = false;
        self.0.changed.notify_all();
    }
}

impl Running {
    /// Stops every vCPU outside of the guest and waits until all have come out.
    pub(super) fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        self.shared.kick();
        loop {
            // Each time: another's pause may have ended meanwhile, this one has not begun.
            state.paused = true;
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

    /// Whether a pause has begun and not ended.
    #[cfg(test)]
    pub(super) fn pauses(&self) -> bool {
        self.shared.lock().paused
    }

    /// Lets vCPUs go on, once nobody saves them any more.
    pub(super) fn resume(&self) {
        let mut state = self.shared.lock();
        while state.saving {
            let changed = &self.shared.changed;
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.paused = false;
        self.shared.changed.notify_all();
    }

    /// Keeps a paused VM paused.
    pub(super) fn hold(&self) -> Result<Held<'_>, SaveError> {
        let mut state = self.shared.lock();
        while state.saving {
            let changed = &self.shared.changed;
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.exit.is_some() {
            return Err(SaveError::Ended);
        }
        if !state.paused || state.parked != state.running {
            return Err(SaveError::Running);
        }
        state.saving = true;
        Ok(Held(&self.shared))
    }

    /// Gives an empty disk what it has from now on, whether or not the VM is paused.
    pub(super) fn fill_disk(&self, disk: usize, files: Vec<File>) -> Result<(), FillError> {
        let (slot, contents) = self.handles.contents(disk, files)?;
        self.shared.devices.fill(slot, contents)?;
        match self.shared.lock().exit {
            // Its devices may have stopped before.
            Some(_) => Err(FillError::Ended),
            None => Ok(()),
        }
    }

    pub(super) fn stop(&self) {
        self.shared.end(Exit::Stopped);
    }

    /// Calls `tell` once it is decided that the VM ends, which may be now.
    pub(super) fn on_end(&self, tell: Box<dyn FnOnce() + Send>) {
        let mut state = self.shared.lock();
        if state.exit.is_none() {
            state.observer = Some(tell);
            return;
        }
        drop(state);
        tell();
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
