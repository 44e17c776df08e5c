//! Work on every device at once, for ever: the disk, a console port, a socket, a timer.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket,
};
use supermachine_tests::work::{BLOCK, BLOCKS, State, VSOCK_PORT};

const PORT: &str = "/dev/vport0p0";
const DISK: &str = "/dev/vda";
/// How often the timer goes off.
const TICK: Duration = Duration::from_millis(10);

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
    let ticks = Arc::new(AtomicU64::new(0));
    let ticking = Arc::clone(&ticks);
    thread::spawn(move || {
        loop {
            thread::sleep(TICK);
            ticking.fetch_add(1, Ordering::Relaxed);
        }
    });
    let latest = Arc::new(Mutex::new(State::default()));
    let told = Arc::clone(&latest);
    thread::spawn(move || {
        if let Err(error) = answer(&told) {
            crate::tell(&format!("guest: vsock: {error:#}"));
        }
    });
    let mut state = State::default();
    loop {
        state.advance();
        on_disk(&disk, &state)?;
        state.ticks = ticks.load(Ordering::Relaxed);
        *latest.lock().unwrap_or_else(PoisonError::into_inner) = state;
        writeln!(port, "{state}").context("cannot write to the port")?;
    }
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

/// Tells whoever connects how far the work is.
fn answer(latest: &Mutex<State>) -> Result<()> {
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
    loop {
        let connection = accept(listener.as_raw_fd()).context("cannot accept")?;
        // SAFETY: accept has just made it, and nobody else has it.
        let mut connection = unsafe { File::from_raw_fd(connection) };
        let state = *latest.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever has gone meanwhile needs no answer.
        let _ = writeln!(connection, "{state}");
    }
}
