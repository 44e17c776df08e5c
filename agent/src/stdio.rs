//! A process's standard streams: pipes or a pty on its side, ports on the host's.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Uid, fchown, pipe2};
use supermachine_protocol::Stdio as Request;

use crate::error::Error;
use crate::platform::{Platform, Port};
use crate::pump::{Pump, Stream};
use crate::sys;

/// How long output may go on after its process has exited: then only processes it left behind can
/// hold the stream open. containerd's shim for runc waits as long.
const GRACE: Duration = Duration::from_secs(2);
/// How long after its start a process may find that the host has not opened its stdin.
pub(crate) const OPENING: Duration = Duration::from_secs(1);

/// The opened ports of a process that doesn't exist yet.
#[derive(Debug)]
pub(crate) struct Ports {
    terminal: bool,
    stdin: Option<Port>,
    stdout: Option<Port>,
    stderr: Option<Port>,
}

/// The descriptors a process is given as 0, 1 and 2.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// The running streams of a process.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    input: Option<Stream>,
    outputs: Vec<Stream>,
    /// Kept to set the window size.
    terminal: Option<Arc<OwnedFd>>,
}

impl Ports {
    pub(crate) async fn open(platform: &dyn Platform, request: &Request) -> Result<Self, Error> {
        if request.terminal && request.stderr_port != 0 {
            return Err(Error::invalid(
                "stdio",
                "a terminal has no stderr of its own",
            ));
        }
        let open = async |port: u32| match port {
            0 => Ok(None),
            port => platform.open_port(port).await.map(Some),
        };
        Ok(Self {
            terminal: request.terminal,
            stdin: open(request.stdin_port).await?,
            stdout: open(request.stdout_port).await?,
            stderr: open(request.stderr_port).await?,
        })
    }

    /// Makes pipes for what has a port, and starts to copy. With a terminal there is nothing to
    /// copy before [`Streams::attach_terminal`].
    pub(crate) fn connect(
        self,
        pump: &Pump,
        owner: u32,
    ) -> Result<(ProcessEnds, Streams, Option<Self>), Error> {
        let mut streams = Streams::default();
        if self.terminal {
            let ends = ProcessEnds {
                stdin: null()?,
                stdout: null()?,
                stderr: null()?,
            };
            return Ok((ends, streams, Some(self)));
        }
        let stdin = match self.stdin {
            Some(port) => {
                let (ours, theirs) = pipe_from_us(owner)?;
                let copied = pump.copy(port.fd, ours, port.virtio);
                streams.input = Some(copied.map_err(Error::system("copy stdin"))?);
                theirs
            }
            None => null()?,
        };
        let mut output = |port: Option<Port>| match port {
            Some(port) => {
                let (ours, theirs) = pipe_to_us(owner)?;
                let copied = pump.copy(ours, port.fd, false);
                streams
                    .outputs
                    .push(copied.map_err(Error::system("copy output"))?);
                Ok(theirs)
            }
            None => null(),
        };
        let (stdout, stderr) = (output(self.stdout)?, output(self.stderr)?);
        Ok((
            ProcessEnds {
                stdin,
                stdout,
                stderr,
            },
            streams,
            None,
        ))
    }
}

impl Streams {
    /// Starts to copy between the ports and a pty's master.
    ///
    /// `owner` gets the terminal, so that it may open it by name, as with runc.
    pub(crate) fn attach_terminal(
        &mut self,
        pump: &Pump,
        ports: Ports,
        master: OwnedFd,
        owner: u32,
    ) -> Result<(), Error> {
        let copy = Error::system::<io::Error>;
        nonblocking(&master)?;
        let terminal = sys::open_pty_peer(&master).map_err(copy("open a terminal"))?;
        fchown(&terminal, Some(Uid::from_raw(owner)), None)
            .map_err(Error::system("give a terminal to its user"))?;
        drop(terminal);
        // Each stream has descriptors of its own: a number can be in an epoll instance only once.
        let clone = || master.try_clone().map_err(copy("duplicate a terminal"));
        if let Some(port) = ports.stdin {
            let copied = pump.copy(port.fd, clone()?, port.virtio);
            self.input = Some(copied.map_err(copy("copy to a terminal"))?);
        }
        if let Some(port) = ports.stdout {
            let copied = pump.copy(clone()?, port.fd, false);
            self.outputs
                .push(copied.map_err(copy("copy from a terminal"))?);
        }
        self.terminal = Some(Arc::new(master));
        Ok(())
    }

    /// Sets the size of the process's terminal.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<(), Error> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| Error::State("Process has no terminal".to_owned()))?;
        sys::set_window_size(terminal, columns, rows).map_err(Error::system("resize a terminal"))
    }

    /// Ends stdin once everything received so far was delivered.
    pub(crate) fn close_input(&self) {
        if let Some(input) = &self.input {
            input.close_when_idle();
        }
    }

    /// Whether [`Streams::assume_opened`] may be needed.
    pub(crate) fn has_input(&self) -> bool {
        self.input.is_some()
    }

    /// Takes it that the host has opened stdin by now, [`OPENING`] after the process's start.
    pub(crate) fn assume_opened(&self) {
        if let Some(input) = &self.input {
            input.assume_opened();
        }
    }

    /// Finishes the streams of a process that has exited.
    pub(crate) async fn drain(mut self) {
        if let Some(input) = self.input.take() {
            input.cut();
        }
        // The streams end with the pty's master only after everything in it was read.
        drop(self.terminal.take());
        let outputs = &mut self.outputs;
        let all = async {
            for output in outputs.iter_mut() {
                output.finished().await;
            }
        };
        if tokio::time::timeout(GRACE, all).await.is_ok() {
            return;
        }
        for output in &self.outputs {
            output.close_when_idle();
        }
        for output in &mut self.outputs {
            output.finished().await;
        }
    }
}

impl Drop for Streams {
    /// Frees the ports, also where a host never read what was written.
    fn drop(&mut self) {
        for stream in self.input.iter().chain(&self.outputs) {
            stream.cut();
        }
    }
}

fn null() -> Result<OwnedFd, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .map_err(Error::file("open", "/dev/null"))
}

/// A pipe whose read end belongs to the process. Only our end is non-blocking.
fn pipe_from_us(owner: u32) -> Result<(OwnedFd, OwnedFd), Error> {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
    own(&theirs, owner)?;
    nonblocking(&ours)?;
    Ok((ours, theirs))
}

/// A pipe whose write end belongs to the process.
fn pipe_to_us(owner: u32) -> Result<(OwnedFd, OwnedFd), Error> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
    own(&theirs, owner)?;
    nonblocking(&ours)?;
    Ok((ours, theirs))
}

/// Lets the process's user open("/dev/stdout"), which asks for the pipe's permissions.
fn own(pipe: &OwnedFd, owner: u32) -> Result<(), Error> {
    fchown(pipe, Some(Uid::from_raw(owner)), None).map_err(Error::system("give a pipe to its user"))
}

fn nonblocking(fd: &impl AsFd) -> Result<(), Error> {
    let set = || -> nix::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    };
    set().map_err(Error::system("make a stream non-blocking"))
}
