//! The shim's side: starts the process and waits for its word.

use std::fs::{self, DirBuilder, File};
use std::io::{self, IoSlice, PipeReader, pipe};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use supermachine_vmm::jail;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::child::{APPLYING, ARG0, FILES};
use super::{Job, Outcome, Place};

/// This program, whatever has become of its file.
const PROGRAM: &str = "/proc/self/exe";

/// The most the process says; what is more is no word of its own.
const WORDS: u64 = 64 << 10;

/// What it may take to apply what was received, beyond the guest's time.
const APPLYING_TIME: Duration = Duration::from_secs(60);

/// What the end of a process may take that has been killed.
const GOING: Duration = Duration::from_secs(5);

/// A process that writes changes back. Dropped, it is killed.
#[derive(Debug)]
pub struct Started {
    child: Child,
    words: PipeReader,
    limit: Duration,
}

/// Starts one, with a connection on which a guest tells its changes. The staging directory is made,
/// and is the caller's to remove afterwards. Blocks for moments.
///
/// # Errors
/// A directory can't be opened or made, or the process not be started.
pub fn start(job: &Job, place: &Place, stream: &UnixStream) -> io::Result<Started> {
    // Of a time when a shim of this container was killed.
    match fs::remove_dir_all(&place.staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    DirBuilder::new().mode(0o700).create(&place.staging)?;
    let target = File::open(&place.directory)?;
    let staging = File::open(&place.staging)?;
    let (ours, theirs) = UnixStream::pair()?;
    let (words, said) = pipe()?;
    let mut command = Command::new(PROGRAM);
    command
        .arg0(ARG0)
        .arg(serde_json::to_string(job)?)
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(said.try_clone()?)
        .stderr(said);
    let child = jail::spawn_apart(&mut command)?;
    let started = Started {
        child,
        words,
        limit: job.time + APPLYING_TIME,
    };
    send(&ours, [stream.as_fd(), target.as_fd(), staging.as_fd()])?;
    Ok(started)
}

fn send(socket: &UnixStream, files: [std::os::fd::BorrowedFd<'_>; FILES]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    sendmsg(
        socket,
        &[IoSlice::new(b"f")],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

impl Started {
    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    pub async fn outcome(self) -> Outcome {
        let read = async {
            let words = self.words.try_clone().map(OwnedFd::from)?;
            let mut words = Receiver::from_owned_fd(words)?.take(WORDS);
            let mut text = String::new();
            // Invalid UTF-8 is an error, which is right: the process says none.
            words.read_to_string(&mut text).await?;
            Ok::<_, io::Error>(text)
        };
        let outcome = match tokio::time::timeout(self.limit, read).await {
            Ok(Ok(text)) => heard(&text),
            Ok(Err(error)) => Outcome::Partial {
                reason: format!("its process can't be heard: {error}"),
            },
            Err(_) => Outcome::Partial {
                reason: format!("it took more than {:?}", self.limit),
            },
        };
        // Killed and waited for, which nobody waits for if the host's disk hangs.
        let gone = tokio::task::spawn_blocking(move || drop(self));
        let _ = tokio::time::timeout(GOING, gone).await;
        outcome
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Both fail only for a child that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the process's words mean: the last line, unless it died before it could say it.
fn heard(text: &str) -> Outcome {
    let last = text.lines().last().unwrap_or_default();
    if let Ok(outcome) = serde_json::from_str(last) {
        return outcome;
    }
    let reason = format!(
        "its process ended early; it said {:?}",
        crate::agent::clean(text)
    );
    match text.lines().any(|line| line == APPLYING) {
        true => Outcome::Partial { reason },
        false => Outcome::Refused { reason },
    }
}
