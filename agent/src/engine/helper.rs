//! The re-executed half: makes one container or one exec'd process, reports it, and is gone.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::LinuxCapabilities;
use libcontainer::syscall::syscall::SyscallType;
use serde::{Deserialize, Serialize};

use super::executor::Program;
use super::message;
use super::privileges::Privileges;
use super::seccomp::Filter;
use crate::sys;

/// `argv[0]` of a helper.
pub(crate) const NAME: &str = "supermachine-container";

/// The file in a container's directory with its filter of system calls, if it has one.
pub(crate) const SECCOMP: &str = "seccomp";

/// What of a process libcontainer isn't told, because it is ours to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Withheld {
    /// None where a set isn't told.
    pub(crate) capabilities: LinuxCapabilities,
    pub(crate) no_new_privileges: bool,
    pub(crate) cwd: PathBuf,
}

/// What a helper is asked to make; passed as one JSON argument.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) container_id: String,
    /// Directory of libcontainer's own state.
    pub(crate) state: PathBuf,
    /// Directory with config.json.
    pub(crate) bundle: PathBuf,
    /// For an exec: file with the OCI process.
    pub(crate) process: Option<PathBuf>,
    /// Listening socket that takes the pty's master.
    pub(crate) console: Option<PathBuf>,
    pub(crate) withheld: Withheld,
    /// Numbers of the inherited sockets.
    pub(crate) helper: i32,
    pub(crate) program: i32,
}

impl Job {
    pub(crate) fn to_argument(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    fn from_argument(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// Runs a helper if this process was started as one: `Some` is its exit code.
///
/// Must be called before any thread exists.
pub fn main() -> Option<ExitCode> {
    let mut args = env::args();
    if args.next()? != NAME {
        return None;
    }
    let job = args.next().and_then(|text| Job::from_argument(&text));
    let sockets = job.as_ref().map(|job| {
        (
            sys::inherited_socket(job.helper),
            sys::inherited_socket(job.program),
        )
    });
    let (Some(job), Some((Ok(mut agent), Ok(program)))) = (job, sockets) else {
        return Some(ExitCode::from(2));
    };
    let answer = match make(&job, program) {
        Ok(pid) => format!("{}{pid}", char::from(message::PID)),
        Err(error) => format!("{}{}", char::from(message::ERROR), chain(&*error)),
    };
    Some(report(&mut agent, &answer))
}

/// Says what was made and waits for the agent to have heard.
fn report(agent: &mut UnixStream, answer: &str) -> ExitCode {
    let said = agent
        .write_all(answer.as_bytes())
        .and_then(|()| agent.shutdown(std::net::Shutdown::Write));
    match said.and_then(|()| agent.read(&mut [0])) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn make(job: &Job, program: UnixStream) -> Result<i32, Box<dyn std::error::Error>> {
    // The agent's own protection is not for its containers; a config that asks for a value gets it.
    fs::write("/proc/self/oom_score_adj", "0")?;
    let filter = Filter::read(&job.bundle.join(SECCOMP))?;
    let withheld = &job.withheld;
    let privileges = Privileges::new(&withheld.capabilities, withheld.no_new_privileges, filter);
    let program = Program::new(program, privileges, &withheld.cwd, job.process.is_none());
    let builder = ContainerBuilder::new(job.container_id.clone(), SyscallType::default())
        .with_executor(program)
        .with_root_path(&job.state)?
        .with_console_socket(job.console.as_deref());
    let pid = match &job.process {
        None => {
            let container = builder.as_init(&job.bundle).with_systemd(false).build()?;
            container
                .pid()
                .ok_or("The engine has made a container without a process")?
        }
        Some(process) => builder
            .as_tenant()
            .with_detach(true)
            .with_process(Some(Path::new(process)))
            .build()?,
    };
    Ok(pid.as_raw())
}

/// An error with all its causes, none of them twice.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
