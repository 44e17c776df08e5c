//! A program that logs a process's output, as containerd has them started (its
//! cmd/containerd-shim-runc-v2/process/io.go): descriptor 3 reads stdout, 4 reads stderr, and 5 is
//! closed when it is ready; the container's name is in its environment, where nothing else is.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::{OFlags, fcntl_setfl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::stdio::Error;
use crate::request::Logger;

/// How long it may take until it is ready.
const READY: Duration = Duration::from_secs(10);

/// A logger that is not started yet, with the ends it will read from.
#[derive(Debug)]
pub(crate) struct Pending {
    logger: Logger,
    stdout: PipeReader,
    stderr: PipeReader,
}

/// A started logger, which may not be ready yet. It ends when its streams do.
#[derive(Debug)]
pub(crate) struct Started {
    program: PathBuf,
    speaks: bool,
    child: Child,
    ready: pipe::Receiver,
}

impl Pending {
    /// The logger, and what to write stdout and stderr to.
    pub(crate) fn new(logger: &Logger) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let failed = |source| failed(&logger.program, source);
        let (stdout, out) = io::pipe().map_err(failed)?;
        let (stderr, err) = io::pipe().map_err(failed)?;
        let pending = Self {
            logger: logger.clone(),
            stdout,
            stderr,
        };
        let writable = |end: PipeWriter| {
            // The machine's process must not wait for a slow logger.
            fcntl_setfl(&end, OFlags::NONBLOCK)?;
            Ok::<_, io::Error>(OwnedFd::from(end))
        };
        Ok((
            pending,
            writable(out).map_err(failed)?,
            writable(err).map_err(failed)?,
        ))
    }

    /// Executes it for process `id`.
    pub(crate) fn start(self, namespace: &str, id: &str) -> Result<Started, Error> {
        let Self {
            logger,
            stdout,
            stderr,
        } = self;
        let start = || {
            let (ready, told) = io::pipe()?;
            let fds = [
                (OwnedFd::from(stdout), 3),
                (OwnedFd::from(stderr), 4),
                (OwnedFd::from(told), 5),
            ];
            let mut command = Command::new(&logger.program);
            command
                .args(&logger.args)
                .env_clear()
                .env("CONTAINER_ID", id)
                .env("CONTAINER_NAMESPACE", namespace)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .fd_mappings(
                    fds.map(|(parent_fd, child_fd)| FdMapping {
                        parent_fd,
                        child_fd,
                    })
                    .into(),
                )
                .map_err(io::Error::other)?;
            let child = command.spawn()?;
            // The command holds the ends that are now the logger's.
            drop(command);
            let ready = pipe::Receiver::from_owned_fd(ready.into())?;
            Ok((child, ready))
        };
        let (child, ready) = start().map_err(|source| failed(&logger.program, source))?;
        Ok(Started {
            program: logger.program,
            speaks: logger.speaks,
            child,
            ready,
        })
    }
}

impl Started {
    /// Its process; none once it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Kills it.
    pub(crate) fn kill(mut self) {
        // It may have ended.
        let _ = self.child.start_kill();
    }

    /// Waits until it is ready; if it never is, it is killed.
    pub(crate) async fn ready(mut self) -> Result<(), Error> {
        let mut byte = [0];
        let told = tokio::time::timeout(READY, self.ready.read(&mut byte)).await;
        let reason = match told {
            Ok(Ok(1)) => return Ok(()),
            // Closed: as good as a word, but for the protocol's second version.
            Ok(Ok(_)) if !self.speaks => return Ok(()),
            Ok(Ok(_)) => "it closed descriptor 5 without a word".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it neither wrote to descriptor 5 nor closed it within {READY:?}"),
        };
        let program = self.program.clone();
        self.kill();
        Err(Error::LoggerNotReady { program, reason })
    }
}

fn failed(program: &std::path::Path, source: io::Error) -> Error {
    Error::Logger {
        program: program.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;
    use crate::request::{Stdio, Stream};

    /// A shell script as logger, with the folder it logs to as its one value.
    fn logger(directory: &Path, script: &str, scheme: &str) -> Logger {
        let program = directory.join("a logger");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let directory = directory.display();
        let uri = format!("{scheme}://{directory}/a%20logger?to={directory}");
        match Stdio::new("", &uri, &uri, false).unwrap().stdout {
            Stream::Logger(logger) => *logger,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams_and_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let script = "exec 5>&-; cat <&3 > $2/out; cat <&4 > $2/err; \
                      echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 > $2/name";
        let logger = logger(directory.path(), script, "binary");
        let (pending, out, err) = Pending::new(&logger).unwrap();
        let mut started = pending.start("default", "c1").unwrap();
        let (mut out, mut err) = (File::from(out), File::from(err));
        out.write_all(b"of stdout").unwrap();
        err.write_all(b"of stderr").unwrap();
        drop((out, err));
        // It ends with its streams.
        assert!(started.child.wait().await.unwrap().success());
        let said = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(said("out"), "of stdout");
        assert_eq!(said("err"), "of stderr");
        assert_eq!(said("name"), "default/c1 to\n");
        started.ready().await.unwrap();
    }

    #[tokio::test]
    async fn one_that_cannot_start_or_says_nothing_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let silent = logger(directory.path(), "exit 0", "binary-v2");
        let (pending, ..) = Pending::new(&silent).unwrap();
        let error = pending.start("n", "c").unwrap().ready().await.unwrap_err();
        assert!(error.to_string().contains("a logger"), "{error}");

        let mut missing = silent;
        missing.program = "/no/such/logger".into();
        let (pending, ..) = Pending::new(&missing).unwrap();
        let error = pending.start("n", "c").unwrap_err();
        assert!(error.to_string().contains("/no/such/logger"), "{error}");
    }
}
