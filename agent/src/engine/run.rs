//! The agent's half: starts a helper and follows what it makes.

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net as blocking;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use super::helper::{self, Job, Withheld};
use super::message;
use crate::error::Error;
use crate::reaper::{ExitStatus, Reaper};
use crate::stdio::ProcessEnds;

/// What is to be made.
#[derive(Debug)]
pub(crate) struct Order<'a> {
    pub(crate) container_id: &'a str,
    pub(crate) state: &'a Path,
    pub(crate) bundle: &'a Path,
    /// File with the OCI process, for an exec.
    pub(crate) process: Option<&'a Path>,
    /// Path for the socket through which a pty comes, if the process is to have one.
    pub(crate) console: Option<&'a Path>,
    pub(crate) withheld: Withheld,
}

/// A helper at work.
#[derive(Debug)]
pub(crate) struct Making {
    helper: UnixStream,
    program: Waiting,
    /// Where the process's terminal comes from.
    pub(crate) console: Option<Console>,
}

/// Takes the pty's master from a process that has one.
#[derive(Debug)]
pub(crate) struct Console {
    listener: UnixListener,
    /// Gone with it.
    path: PathBuf,
}

/// A process whose program does not run yet.
#[derive(Debug)]
pub(crate) struct Waiting {
    program: UnixStream,
    /// What the process has said so far.
    said: Vec<u8>,
}

/// A process that exists, and how to learn of its end.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<ExitStatus>,
    pub(crate) waiting: Waiting,
}

impl Making {
    /// Starts a helper; `ends` become the new process's standard streams.
    pub(crate) fn start(
        order: &Order<'_>,
        ends: ProcessEnds,
        reaper: &Reaper,
    ) -> Result<Self, Error> {
        let start = || -> io::Result<Self> {
            let (helper, their_helper) = blocking::UnixStream::pair()?;
            let (program, their_program) = blocking::UnixStream::pair()?;
            let console = match order.console {
                Some(path) => Some(Console {
                    listener: UnixListener::bind(path)?,
                    path: path.to_owned(),
                }),
                None => None,
            };
            let job = Job {
                container_id: order.container_id.to_owned(),
                state: order.state.to_owned(),
                bundle: order.bundle.to_owned(),
                process: order.process.map(Path::to_owned),
                console: order.console.map(Path::to_owned),
                withheld: order.withheld.clone(),
                helper: their_helper.as_raw_fd(),
                program: their_program.as_raw_fd(),
            };
            // The agent spawns from this thread alone, so no other child inherits them.
            inherit(&their_helper)?;
            inherit(&their_program)?;
            reaper.spawn(
                Command::new("/proc/self/exe")
                    .arg0(helper::NAME)
                    .arg(job.to_argument()?)
                    .env_clear()
                    .current_dir("/")
                    .stdin(ends.stdin)
                    .stdout(ends.stdout)
                    .stderr(ends.stderr),
            )?;
            Ok(Self {
                helper: asynchronous(helper)?,
                program: Waiting {
                    program: asynchronous(program)?,
                    said: Vec::new(),
                },
                console,
            })
        };
        start().map_err(Error::system("start a container helper"))
    }

    /// Waits until the process says that it would run its program now. `false`: it failed.
    pub(crate) async fn ready(&mut self) -> bool {
        self.program.ready().await
    }

    /// Lets an exec'd process run its program as soon as it is ready.
    pub(crate) async fn go(&mut self) {
        self.program.go().await;
    }

    /// Waits until the helper is done. An init then waits for [`Waiting::run`]; an exec'd process
    /// runs its program.
    pub(crate) async fn made(mut self, reaper: &Reaper) -> Result<Made, Error> {
        let mut answer = Vec::new();
        let heard = self.helper.read_to_end(&mut answer).await;
        heard.map_err(Error::system("hear from a container helper"))?;
        let text = String::from_utf8_lossy(answer.get(1..).unwrap_or_default()).into_owned();
        if answer.first() == Some(&message::PID)
            && let Ok(pid) = text.parse()
        {
            let pid = Pid::from_raw(pid);
            // The helper is the parent until it hears that the socket was closed.
            let exit = reaper.watch(pid);
            return Ok(Made {
                pid,
                exit,
                waiting: self.program,
            });
        }
        // Nearer to the truth than the engine's account, if there is one.
        drop(self.helper);
        if let Some(text) = self.program.failure().await {
            return Err(Error::Program(text));
        }
        let reason = if text.is_empty() {
            "the helper died".to_owned()
        } else {
            text
        };
        Err(Error::Engine {
            action: "create the process",
            reason,
        })
    }
}

impl Console {
    /// Waits for the terminal: of an exec once it is [`Making::ready`], of an init once it is
    /// [`Making::made`]. Before that a process that fails would be waited for in vain.
    pub(crate) async fn terminal(self) -> Result<OwnedFd, Error> {
        let take = async {
            let (stream, _) = self.listener.accept().await?;
            stream.readable().await?;
            receive_descriptor(&stream.into_std()?)
        };
        take.await.map_err(Error::system("receive a terminal"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may have gone with the whole guest's files.
        let _ = fs::remove_file(&self.path);
    }
}

impl Waiting {
    async fn ready(&mut self) -> bool {
        self.said.extend(self.program.read_u8().await.ok());
        self.said.last() == Some(&message::READY)
    }

    async fn go(&mut self) {
        // A process that is gone cannot be told; its end shows elsewhere.
        let _ = self.program.write_all(&[message::RUN]).await;
    }

    /// Waits until the program runs. Libcontainer's own start signal must have been given.
    pub(crate) async fn run(mut self) -> Result<(), Error> {
        self.go().await;
        match self.failure().await {
            None => Ok(()),
            Some(text) => Err(Error::Program(text)),
        }
    }

    /// What the process says before the socket closes, if it is of a failure.
    async fn failure(&mut self) -> Option<String> {
        // A reset socket says as much as a closed one.
        let _ = self.program.read_to_end(&mut self.said).await;
        let failed = self.said.iter().position(|&byte| byte == message::FAILED)?;
        Some(String::from_utf8_lossy(self.said.get(failed + 1..)?).into_owned())
    }
}

fn asynchronous(stream: blocking::UnixStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

fn inherit(fd: &impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

fn receive_descriptor(stream: &blocking::UnixStream) -> io::Result<OwnedFd> {
    let mut data = [0; 64];
    let mut data = [IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &mut data,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            return Ok(crate::sys::received(fd));
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}
