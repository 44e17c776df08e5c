//! The process that does it, from its confinement to its end.
//!
//! It needs root's ways with other people's files, and no more: capabilities for that alone, two
//! directories, the connection to the guest, and a pipe to say on what became of it.

use std::env;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use nix::libc;
use rustix::cmsg_space;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::fchdir;
use rustix::thread::CapabilitySet;
use supermachine_vmm::jail::{self, EVERY, Filter, JailError, Keep, Missing, Policy, Rule, allow};

use super::{Job, Outcome, apply, receive};

/// `argv[0]` of the process.
pub(super) const ARG0: &str = "supermachine-changes";

/// What it says once the snapshot is no longer as it was.
pub(super) const APPLYING: &str = "applying";

/// Descriptors it is sent: the connection, the snapshot's directory, the staging directory.
pub(super) const FILES: usize = 3;

const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    // For `trusted.*` attributes.
    .union(CapabilitySet::SYS_ADMIN);

/// What it takes to make inodes, move and remove them.
const FILTER: Filter = Filter {
    name: "changes",
    tables: &[EVERY, WORK],
};

const WORK: &[Rule] = &[
    allow(libc::SYS_openat),
    allow(libc::SYS_openat2),
    allow(libc::SYS_getdents64),
    allow(libc::SYS_fstat),
    allow(libc::SYS_statx),
    allow(libc::SYS_newfstatat),
    allow(libc::SYS_fcntl),
    allow(libc::SYS_lseek),
    allow(libc::SYS_pwrite64),
    allow(libc::SYS_ftruncate),
    allow(libc::SYS_mkdirat),
    allow(libc::SYS_mknodat),
    allow(libc::SYS_symlinkat),
    allow(libc::SYS_linkat),
    allow(libc::SYS_unlinkat),
    allow(libc::SYS_renameat),
    allow(libc::SYS_renameat2),
    allow(libc::SYS_fchown),
    allow(libc::SYS_fchownat),
    allow(libc::SYS_fchmod),
    allow(libc::SYS_fchmodat),
    allow(libc::SYS_utimensat),
    allow(libc::SYS_flistxattr),
    allow(libc::SYS_fremovexattr),
    allow(libc::SYS_fsetxattr),
    allow(libc::SYS_lsetxattr),
    allow(libc::SYS_fchdir),
];

/// Runs the process if this program was executed to be it, and returns its exit status. Must be
/// called before any thread exists and any file is open.
pub fn main() -> Option<ExitCode> {
    let mut args = env::args();
    if args.next()? != ARG0 {
        return None;
    }
    let outcome = args
        .next()
        .ok_or_else(|| "it was told nothing".to_owned())
        .and_then(|job| serde_json::from_str(&job).map_err(|error| error.to_string()))
        .and_then(|job| {
            begin(&job)
                .map_err(|error| chain(&*error))
                .map(|files| (job, files))
        });
    let outcome = match outcome {
        Ok((job, files)) => write(&job, files),
        Err(reason) => Outcome::Refused { reason },
    };
    // With nobody there to read it, there is nobody to tell so.
    let told = serde_json::to_string(&outcome).map(say);
    Some(match told {
        Ok(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn say(line: impl AsRef<str>) -> io::Result<()> {
    io::stdout().write_all(format!("{}\n", line.as_ref()).as_bytes())
}

/// What the process works with.
struct Files {
    stream: File,
    target: OwnedFd,
    staging: OwnedFd,
}

/// Takes the files and confines the process to them.
fn begin(job: &Job) -> Result<Files, Box<dyn std::error::Error>> {
    jail::close_inherited()?;
    let [stream, target, staging] = take_files()?;
    set_socket_timeout(&stream, Timeout::Recv, Some(job.silence))?;
    confine(&job.jail, [target.as_fd(), staging.as_fd()])?;
    fchdir(&staging)?;
    Ok(Files {
        stream: stream.into(),
        target,
        staging,
    })
}

/// Leaves the calling process two directories, and what it takes to make inodes beneath them; tells
/// which layers of the jail this host lacks. Legal only while it has one thread.
///
/// # Errors
/// As [`jail::enter_keeping`].
pub fn confine(policy: &Policy, beneath: [BorrowedFd<'_>; 2]) -> Result<Vec<Missing>, JailError> {
    let keep = Keep {
        capabilities: CAPABILITIES,
        beneath: &beneath,
    };
    jail::enter_keeping(policy, &FILTER, &keep)
}

/// Receives the files over the socket that is standard input.
fn take_files() -> io::Result<[OwnedFd; FILES]> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        io::stdin(),
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let files: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    <[OwnedFd; FILES]>::try_from(files)
        .map_err(|files| io::Error::other(format!("{} files came, expected {FILES}", files.len())))
}

fn write(job: &Job, files: Files) -> Outcome {
    let received = match receive::receive(files.stream, &files.staging, job) {
        Ok(received) => received,
        Err(error) => {
            return Outcome::Refused {
                reason: chain(&error),
            };
        }
    };
    let applied = say(APPLYING)
        .map_err(|error| error.to_string())
        .and_then(|()| {
            apply::apply(received.journal, &files.staging, files.target, job)
                .map_err(|error| chain(&error))
        });
    match applied {
        Ok(()) => Outcome::Written {
            entries: received.entries,
            bytes: received.bytes,
        },
        Err(reason) => Outcome::Partial { reason },
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
