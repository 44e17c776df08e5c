//! A guest's `/init`, for tests and benches that boot a VM without a container: does what its
//! kernel's command line says (`GUEST=memory`, `GUEST=disk`, `GUEST=slots`, `GUEST=work`, `GUEST=wait`), then
//! resets the machine.

mod commands;
#[allow(
    unsafe_code,
    reason = "asynchronous I/O is system calls that no library of ours has"
)]
mod disk;
mod memory;
mod slots;
#[allow(
    unsafe_code,
    reason = "an accepted connection is a number that somebody must own"
)]
mod work;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        // Of a guest, that is: this resets the machine.
        return ExitCode::FAILURE;
    }
    if let Err(error) = run() {
        tell(&format!("guest: {error:#}"));
    }
    // Returns only when it fails; then the kernel panics, which ends the machine too.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    ExitCode::FAILURE
}

/// Says something to the host, in the kernel's log: the lean kernel prints it to the serial port,
/// which is nothing a process could open.
fn tell(text: &str) {
    // Of the most urgent kind, which `quiet` lets through.
    let _ = std::fs::write("/dev/kmsg", format!("<0>{text}"));
}

fn run() -> Result<()> {
    for (kind, dir) in [("devtmpfs", "/dev"), ("proc", "/proc")] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}"))?;
        mount(Some(kind), dir, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {dir}"))?;
    }
    // The kernel hands on as environment what it doesn't know.
    match std::env::var("GUEST").as_deref() {
        Ok("memory") => memory::run(),
        Ok("disk") => disk::run(),
        Ok("slots") => slots::run(),
        Ok("work") => work::run(),
        Ok("wait") => loop {
            nix::unistd::pause();
        },
        other => bail!("GUEST={other:?} on the command line is nothing this program does"),
    }
}
