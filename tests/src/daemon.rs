//! A daemon that says when it is ready, as systemd would hear it (sd_notify(3)).

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long one may take until it serves; an emulated machine needs seconds.
const START: Duration = Duration::from_secs(90);
/// How long one may take to end.
const STOP: Duration = Duration::from_secs(30);

/// Starts `command` in its folder `home`, its output appended to `home/log`, and waits until it is
/// ready.
pub(crate) fn start(mut command: Command, home: &Path) -> Result<Child> {
    let notify = home.join("notify");
    let _ = fs::remove_file(&notify);
    let ready = UnixDatagram::bind(&notify).context("cannot bind the notification socket")?;
    let output = File::options()
        .create(true)
        .append(true)
        .open(home.join("log"))
        .context("cannot create its log")?;
    let name = command.get_program().display().to_string();
    let mut child = command
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot clone its log")?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    if let Err(error) = wait_ready(&mut child, &ready) {
        end(child);
        let log = log(home);
        return Err(error.context(format!("{name}; its log ends:\n{}", tail(&log))));
    }
    Ok(child)
}

/// All that the daemon of `home` has logged.
pub(crate) fn log(home: &Path) -> String {
    fs::read_to_string(home.join("log")).unwrap_or_default()
}

fn wait_ready(child: &mut Child, ready: &UnixDatagram) -> Result<()> {
    let deadline = Instant::now() + START;
    // Short, so that an early death is noticed; readiness itself arrives as a message.
    ready
        .set_read_timeout(Some(Duration::from_millis(250)))
        .context("no timeout")?;
    let mut message = [0_u8; 256];
    while Instant::now() < deadline {
        if let Ok(count) = ready.recv(&mut message)
            && message
                .get(..count)
                .is_some_and(|text| contains(text, b"READY=1"))
        {
            return Ok(());
        }
        if let Some(status) = child.try_wait().context("cannot ask for its status")? {
            bail!("it ended with {status}");
        }
    }
    bail!("it was not ready after {START:?}")
}

/// Ends a daemon in good order; by force if it takes too long.
pub(crate) fn end(mut child: Child) {
    let Ok(pid) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return;
    };
    let _ = kill(pid, Signal::SIGTERM);
    let (sender, ended) = mpsc::channel();
    let waiter = thread::spawn(move || sender.send(child.wait()));
    if ended.recv_timeout(STOP).is_err() {
        // Not reaped yet, so the pid is still its own.
        let _ = kill(pid, Signal::SIGKILL);
    }
    let _ = waiter.join();
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines
        .get(lines.len().saturating_sub(12)..)
        .unwrap_or_default()
        .join("\n")
}
