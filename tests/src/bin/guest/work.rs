//! Work on every device at once, for ever: the disk, a console port, a socket, a timer.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket,
};
use nix::time::{ClockId, clock_gettime};
use supermachine_tests::work::{BLOCK, BLOCKS, State, TICK, TICKS, VSOCK_PORT};

const PORT: &str = "/dev/vport0p0";
const DISK: &str = "/dev/vda";
/// What direct I/O wants buffers to be aligned to.
#[repr(align(4096))]
struct Page([u8; BLOCK]);

pub(crate) fn run() -> Result<()> {
    // It comes soon after the driver; there is nothing to wait on before it is there.
    while !Path::new(PORT).exists() {
        thread::sleep(Duration::from_millis(5));
    }
    let mut port = OpenOptions::new()
        .write(true)
        .open(PORT)
        .with_context(|| format!("cannot open {PORT}"))?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(DISK)
        .with_context(|| format!("cannot open {DISK}"))?;
    let latest = Arc::new(Latest::default());
    let ticking = Arc::clone(&latest);
    thread::spawn(move || {
        loop {
            thread::sleep(TICK);
            ticking.change(|state| state.ticks += 1);
        }
    });
    // Before the first line: whoever has read it may connect.
    let listener = listening()?;
    let told = Arc::clone(&latest);
    thread::spawn(move || {
        if let Err(error) = answer(&listener, &told) {
            crate::tell(&format!("guest: vsock: {error:#}"));
        }
    });
    let mut state = State::default();
    loop {
        state.advance();
        on_disk(&disk, &state)?;
        let State { step, hash, .. } = state;
        let told = latest.change(|latest| (latest.step, latest.hash) = (step, hash));
        // At once: a snapshot is not to be taken in the middle of a line.
        port.write_all(format!("{told}\n").as_bytes())
            .context("cannot write to the port")?;
    }
}

/// The state as it can be told.
#[derive(Debug, Default)]
struct Latest {
    state: Mutex<State>,
    changed: Condvar,
}

impl Latest {
    /// Changes it; the answer has the time.
    fn change(&self, change: impl FnOnce(&mut State)) -> State {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        state.clock = clock();
        self.changed.notify_all();
        *state
    }

    /// The state once the timer has gone off a few times from now on.
    fn after_ticks(&self) -> State {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = state.ticks + TICKS;
        let state = self
            .changed
            .wait_while(state, |state| state.ticks < wanted)
            .unwrap_or_else(PoisonError::into_inner);
        State {
            clock: clock(),
            ..*state
        }
    }
}

/// Microseconds of the monotonic clock.
fn clock() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| Duration::from(time).as_micros() as u64)
}

/// Writes this step's block, past the page cache, and looks at one of an earlier step.
fn on_disk(disk: &File, state: &State) -> Result<()> {
    let at = |step: u64| step % BLOCKS * BLOCK as u64;
    let mut page = Box::new(Page([0; BLOCK]));
    fill(&mut page.0, state.hash);
    disk.write_all_at(&page.0, at(state.step))
        .context("cannot write to the disk")?;
    let back = (state.hash % BLOCKS).min(state.step - 1);
    let earlier = State::after(state.step - back);
    let mut read = Box::new(Page([0; BLOCK]));
    disk.read_exact_at(&mut read.0, at(earlier.step))
        .context("cannot read from the disk")?;
    fill(&mut page.0, earlier.hash);
    ensure!(
        read.0 == page.0,
        "the block of step {} is not what was written, at step {}",
        earlier.step,
        state.step
    );
    Ok(())
}

fn fill(page: &mut [u8; BLOCK], hash: u64) {
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(hash ^ index as u64).to_le_bytes());
    }
}

fn listening() -> Result<OwnedFd> {
    let listener = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("no socket")?;
    let address = VsockAddr::new(libc::VMADDR_CID_ANY, VSOCK_PORT);
    bind(listener.as_raw_fd(), &address).context("cannot bind")?;
    listen(&listener, Backlog::new(4)?).context("cannot listen")?;
    Ok(listener)
}

/// Tells whoever connects how far the work is.
fn answer(listener: &OwnedFd, latest: &Latest) -> Result<()> {
    loop {
        let connection = accept(listener.as_raw_fd()).context("cannot accept")?;
        // SAFETY: accept has just made it, and nobody else has it.
        let mut connection = unsafe { File::from_raw_fd(connection) };
        let state = latest.after_ticks();
        // Whoever has gone meanwhile needs no answer.
        let _ = writeln!(connection, "{state}");
    }
}
