//! Containers through `ctr`, as a user has them.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::containerd::Containerd;
use crate::ctr::Ctr;
use crate::program::{Finished, Program};
use crate::terminal::Terminal;
use crate::{BUSYBOX, RUNC};

/// Where containers are run.
#[derive(Debug, Clone)]
pub struct Host {
    /// The client of the containerd.
    pub ctr: Ctr,
    /// That containerd, when it is ours.
    pub containerd: Option<Arc<Containerd>>,
    /// The runtime's name, or its path.
    pub runtime: String,
    /// The snapshotter; containerd's default when absent.
    pub snapshotter: Option<String>,
    /// The most that one step of a test may take.
    pub deadline: Duration,
}

/// One name for each container of this process.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{prefix}-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

impl Host {
    /// Whether containers run in a VM.
    pub fn is_vm(&self) -> bool {
        self.runtime != RUNC
    }

    /// Runs `ctr` with these arguments to its end.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn ctr(&self, args: &[&str]) -> Result<Finished> {
        Program::run(self.command(args), self.deadline)
    }

    /// A `ctr` with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        self.ctr.command(args.iter().copied())
    }

    /// A container of `image`, to be run in one of the ways `Run` offers.
    pub fn container(&self, image: &str) -> Run<'_> {
        Run {
            host: self,
            image: image.to_owned(),
            id: unique("e2e"),
            options: Vec::new(),
            streams: Some("--null-io".to_owned()),
        }
    }

    /// `ctr run --rm` of a busybox shell script.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn sh(&self, script: &str) -> Result<Finished> {
        self.container(BUSYBOX).run(&["sh", "-c", script])
    }

    /// The state containerd gives a task, such as `RUNNING`; nothing when there is none.
    ///
    /// # Errors
    /// `ctr` failed.
    pub fn status(&self, id: &str) -> Result<Option<String>> {
        Ok(self.task(id)?.map(|(_, status)| status))
    }

    /// A task's process id and state.
    ///
    /// # Errors
    /// `ctr` failed.
    pub fn task(&self, id: &str) -> Result<Option<(u32, String)>> {
        let list = self.ctr(&["tasks", "list"])?.success()?;
        for line in list.lines() {
            if let [task, pid, status] = line.split_whitespace().collect::<Vec<_>>()[..]
                && task == id
            {
                return Ok(Some((pid.parse()?, status.to_owned())));
            }
        }
        Ok(None)
    }
}

/// A container that is not there yet.
#[derive(Debug)]
pub struct Run<'a> {
    host: &'a Host,
    image: String,
    id: String,
    options: Vec<String>,
    /// What a detached one has as streams.
    streams: Option<String>,
}

impl Run<'_> {
    /// Lets a detached one have streams to attach to.
    pub fn with_streams(mut self) -> Self {
        self.streams = None;
        self
    }

    /// Lets a detached one's output go to this URI.
    pub fn with_log(mut self, uri: &str) -> Self {
        self.streams = Some(format!("--log-uri={uri}"));
        self
    }

    /// Adds options of `ctr run`.
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options
            .extend(options.iter().map(|option| (*option).to_owned()));
        self
    }

    /// Gives the container this name.
    pub fn named(mut self, id: &str) -> Self {
        self.id = id.to_owned();
        self
    }

    fn command(&self, how: &[&str], program: &[&str]) -> Command {
        let mut command = self.host.command(&["run", "--runtime", &self.host.runtime]);
        if let Some(snapshotter) = &self.host.snapshotter {
            command.args(["--snapshotter", snapshotter]);
        }
        command
            .args(how)
            .args(&self.options)
            .args([&self.image, &self.id])
            .args(program);
        command
    }

    /// Runs it to its end, with nothing on standard input.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn run(self, program: &[&str]) -> Result<Finished> {
        // Input that ends before the task is there is a trap of ctr's: it never closes the task's.
        let mut running = self.start(program)?;
        let finished = running.program.take().context("no program")?.finish();
        drop(running);
        finished
    }

    /// Runs it to its end, and keeps it and its snapshot.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn keep(self, program: &[&str]) -> Result<(Finished, Kept)> {
        let guard = Guard {
            host: self.host.clone(),
            id: self.id.clone(),
        };
        let command = self.command(&[], program);
        let finished = Program::start(command, self.host.deadline)?.finish()?;
        Ok((finished, Kept { guard }))
    }

    /// Starts it and stays connected to its streams.
    ///
    /// # Errors
    /// `ctr` could not be executed.
    pub fn start(self, program: &[&str]) -> Result<Running> {
        let guard = Guard {
            host: self.host.clone(),
            id: self.id.clone(),
        };
        let program = Program::start(self.command(&["--rm"], program), self.host.deadline)?;
        Ok(Running {
            program: Some(program),
            guard,
        })
    }

    /// Starts it with a terminal of this size.
    ///
    /// # Errors
    /// There is no terminal, or `ctr` could not be executed.
    pub fn start_in_terminal(
        self,
        columns: u16,
        rows: u16,
        program: &[&str],
    ) -> Result<(Terminal, Guard)> {
        let guard = Guard {
            host: self.host.clone(),
            id: self.id.clone(),
        };
        let command = self.command(&["--rm", "--tty"], program);
        Ok((
            Terminal::start(&command, columns, rows, self.host.deadline)?,
            guard,
        ))
    }

    /// Starts it detached; returns when containerd says it has started.
    ///
    /// # Errors
    /// It didn't start.
    pub fn detach(self, program: &[&str]) -> Result<Detached> {
        let guard = Guard {
            host: self.host.clone(),
            id: self.id.clone(),
        };
        let how: Vec<&str> = ["--detach"]
            .into_iter()
            .chain(self.streams.as_deref())
            .collect();
        let command = self.command(&how, program);
        // Its input stays open: the end of that would be the container's.
        Program::start(command, self.host.deadline)?
            .finish()?
            .success()?;
        Ok(Detached { guard })
    }
}

/// A container whose `ctr run` is still there.
#[derive(Debug)]
pub struct Running {
    program: Option<Program>,
    guard: Guard,
}

impl Running {
    /// The `ctr run`.
    ///
    /// # Errors
    /// Never while this is held.
    pub fn program(&mut self) -> Result<&mut Program> {
        self.program.as_mut().context("no program")
    }

    /// The container's name.
    pub fn id(&self) -> &str {
        &self.guard.id
    }

    /// Waits for the end of `ctr run`, which is the container's.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn finish(mut self) -> Result<Finished> {
        self.program.take().context("no program")?.finish()
    }
}

/// A container that has stopped.
#[derive(Debug)]
pub struct Kept {
    guard: Guard,
}

impl Kept {
    /// The container's name.
    pub fn id(&self) -> &str {
        &self.guard.id
    }

    /// Runs its program once more, to its end.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn start_again(&self) -> Result<Finished> {
        let host = &self.guard.host;
        Program::start(host.command(&["tasks", "start", self.id()]), host.deadline)?.finish()
    }
}

/// A container in the background.
#[derive(Debug)]
pub struct Detached {
    guard: Guard,
}

impl Detached {
    /// The container's name.
    pub fn id(&self) -> &str {
        &self.guard.id
    }

    /// Runs a program in it.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn exec(&self, program: &[&str]) -> Result<Finished> {
        self.start_exec(&[], program)?.finish()
    }

    /// Starts a program in it.
    ///
    /// # Errors
    /// `ctr` could not be executed.
    pub fn start_exec(&self, options: &[&str], program: &[&str]) -> Result<Program> {
        Program::start(
            self.exec_command(options, program),
            self.guard.host.deadline,
        )
    }

    /// The `ctr tasks exec` that runs a program in it.
    pub fn exec_command(&self, options: &[&str], program: &[&str]) -> Command {
        let exec = unique("exec");
        let mut command = self
            .guard
            .host
            .command(&["tasks", "exec", "--exec-id", &exec]);
        command.args(options).arg(&self.guard.id).args(program);
        command
    }

    /// Sends a signal to its first process.
    ///
    /// # Errors
    /// What containerd says.
    pub fn kill(&self, signal: &str) -> Result<()> {
        let kill = self
            .guard
            .host
            .ctr(&["tasks", "kill", "--signal", signal, self.id()])?;
        kill.success().map(drop)
    }

    /// Waits for its first process to end and deletes the task; its exit code.
    ///
    /// # Errors
    /// It didn't end in time, or couldn't be deleted.
    pub fn end(self) -> Result<i32> {
        let host = &self.guard.host;
        crate::until(&format!("{} to stop", self.id()), host.deadline, || {
            Ok(host
                .status(self.id())?
                .is_some_and(|status| status == "STOPPED"))
        })?;
        let deleted = host.ctr(&["tasks", "delete", self.id()])?;
        // ctr exits with the task's code, or tells it in a warning, depending on its version.
        let errors = deleted.errors();
        let told = errors.split_once("exit code ").map(|(_, code)| code);
        let digits = |text: &str| {
            text.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        };
        match told.and_then(|text| digits(text).parse().ok()) {
            Some(code) => Ok(code),
            None => deleted.code(),
        }
    }
}

/// Removes what is left of a container, whatever state it is in.
#[derive(Debug)]
pub struct Guard {
    host: Host,
    id: String,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Each fails when there is nothing to do.
        let _ = self.host.ctr(&["tasks", "delete", "--force", &self.id]);
        let _ = self.host.ctr(&["containers", "delete", &self.id]);
    }
}
