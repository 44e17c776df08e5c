//! A process's streams on the host: what containerd names becomes open files for the VMM.
//!
//! No open blocks, whether or not anybody holds the other end of a fifo yet.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::logger::Pending;
use crate::request::{self, Stream};

/// A stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The named file is not there or may not be opened.
    #[error("Cannot open {stream} {}", path.display())]
    Open {
        /// "stdin", "stdout" or "stderr".
        stream: &'static str,
        /// What was named.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The program that logs the output could not be executed.
    #[error("Cannot start the logger {}", program.display())]
    Logger {
        /// What was named.
        program: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The program that logs the output did not come up.
    #[error("The logger {} is not ready: {reason}", program.display())]
    LoggerNotReady {
        /// What was named.
        program: PathBuf,
        /// In words.
        reason: String,
    },
    /// Only a fifo can be stdin.
    #[error("{stream} {} is not a fifo", path.display())]
    NotFifo {
        /// "stdin".
        stream: &'static str,
        /// What was named.
        path: PathBuf,
    },
}

/// A process's open streams.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// What the process reads.
    pub(crate) stdin: Option<OwnedFd>,
    /// Where its output goes.
    pub(crate) stdout: Option<OwnedFd>,
    /// Where its errors go; none with a terminal.
    pub(crate) stderr: Option<OwnedFd>,
    /// Ends kept open by the host.
    pub(crate) held: Held,
    /// The program that reads the output, to be started.
    pub(crate) logger: Option<Pending>,
}

/// Fifo ends that are held so that a client may go and come back.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// A writer of stdin: without it the process would read end-of-file as soon as the client
    /// detaches, or before it attaches. Dropped when containerd closes stdin.
    pub(crate) stdin: Option<OwnedFd>,
    /// Readers of stdout and stderr, never read: without them a write while nobody is attached
    /// would fail. Dropped when the output is complete.
    pub(crate) output: Vec<OwnedFd>,
}

impl Held {
    /// Whether something is in a fifo that its client has not read.
    pub(crate) fn has_unread(&self) -> bool {
        let unread = |fifo: &OwnedFd| rustix::io::ioctl_fionread(fifo).unwrap_or(0) > 0;
        self.output.iter().any(unread)
    }
}

/// Opens what `stdio` names.
pub(crate) fn open(stdio: &request::Stdio) -> Result<Streams, Error> {
    let mut streams = Streams::default();
    if let Some(target) = Target::of("stdin", &stdio.stdin) {
        let (input, holder) = target.open_input()?;
        streams.stdin = Some(input);
        streams.held.stdin = Some(holder);
    }
    if let Stream::Logger(logger) = &stdio.stdout {
        let (pending, out, err) = Pending::new(logger)?;
        streams.stdout = Some(out);
        // Unused, its end is what the logger reads.
        streams.stderr = matches!(stdio.stderr, Stream::Logger(_)).then_some(err);
        streams.logger = Some(pending);
    }
    if let Some(target) = Target::of("stdout", &stdio.stdout) {
        streams.stdout = Some(target.open_output(&mut streams.held)?);
    }
    if let Some(target) = Target::of("stderr", &stdio.stderr) {
        streams.stderr = Some(target.open_output(&mut streams.held)?);
    }
    Ok(streams)
}

struct Target<'a> {
    stream: &'static str,
    path: &'a Path,
    /// To be created if need be.
    file: bool,
}

impl<'a> Target<'a> {
    fn of(stream: &'static str, named: &'a Stream) -> Option<Self> {
        let (path, file) = match named {
            Stream::None | Stream::Logger(_) => return None,
            Stream::Fifo(path) => (path, false),
            Stream::File(path) => (path, true),
        };
        Some(Self { stream, path, file })
    }

    fn open_input(&self) -> Result<(OwnedFd, OwnedFd), Error> {
        if !self.is_fifo()? {
            return Err(Error::NotFifo {
                stream: self.stream,
                path: self.path.to_owned(),
            });
        }
        // The reader first: a writer that does not block needs one.
        let reader = self.open(OpenOptions::new().read(true))?;
        let writer = self.open(OpenOptions::new().write(true))?;
        Ok((reader, writer))
    }

    fn open_output(&self, held: &mut Held) -> Result<OwnedFd, Error> {
        if self.file {
            if let Some(parent) = self.path.parent() {
                fs::create_dir_all(parent).map_err(|source| self.error(source))?;
            }
            return self.open(OpenOptions::new().append(true).create(true).mode(0o644));
        }
        if !self.is_fifo()? {
            return self.open(OpenOptions::new().append(true));
        }
        held.output.push(self.open(OpenOptions::new().read(true))?);
        self.open(OpenOptions::new().write(true))
    }

    fn is_fifo(&self) -> Result<bool, Error> {
        let metadata = fs::metadata(self.path).map_err(|source| self.error(source))?;
        Ok(metadata.file_type().is_fifo())
    }

    fn open(&self, options: &mut OpenOptions) -> Result<OwnedFd, Error> {
        // O_NONBLOCK has the value of a c_int on every system.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let file: io::Result<File> = options.custom_flags(flags).open(self.path);
        file.map(OwnedFd::from).map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Open {
            stream: self.stream,
            path: self.path.to_owned(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::stat::Mode;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn stdio(stdin: &str, stdout: &str, stderr: &str) -> request::Stdio {
        request::Stdio::new(stdin, stdout, stderr, false).unwrap()
    }

    #[test]
    fn output_written_before_a_client_came_is_there_when_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "out");
        let streams = open(&stdio("", &path, "")).unwrap();
        let mut out = File::from(streams.stdout.unwrap());
        out.write_all(b"early").unwrap();
        let mut client = File::open(&path).unwrap();
        drop(out);
        drop(streams.held);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
    }

    #[test]
    fn what_a_client_has_not_read_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "out");
        let streams = open(&stdio("", &path, "")).unwrap();
        assert!(!streams.held.has_unread());
        let mut out = File::from(streams.stdout.unwrap());
        out.write_all(b"x").unwrap();
        assert!(streams.held.has_unread());
        let mut client = File::open(&path).unwrap();
        client.read_exact(&mut [0]).unwrap();
        assert!(!streams.held.has_unread());
    }

    #[test]
    fn stdin_does_not_end_while_its_writer_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "in");
        let streams = open(&stdio(&path, "", "")).unwrap();
        let mut input = File::from(streams.stdin.unwrap());
        let mut buffer = [0; 8];
        {
            let mut client = OpenOptions::new().write(true).open(&path).unwrap();
            client.write_all(b"hi").unwrap();
        }
        assert_eq!(input.read(&mut buffer).unwrap(), 2);
        let waiting = input.read(&mut buffer).unwrap_err();
        assert_eq!(waiting.kind(), io::ErrorKind::WouldBlock);
        drop(streams.held.stdin);
        // A child that another test starts has a copy until it executes: the end is awaited.
        let limit = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        let ended = poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&limit));
        assert_eq!(ended.unwrap(), 1, "no end");
        assert_eq!(input.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_file_is_made_and_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("logs/out.log");
        let uri = format!("file://{}", path.display());
        for text in ["a", "b"] {
            let streams = open(&stdio("", &uri, "")).unwrap();
            File::from(streams.stdout.unwrap())
                .write_all(text.as_bytes())
                .unwrap();
        }
        assert_eq!(fs::read_to_string(path).unwrap(), "ab");
    }

    #[test]
    fn what_cannot_be_a_stream_is_named() {
        let missing = open(&stdio("", "/nonexistent/fifo", "")).unwrap_err();
        assert!(missing.to_string().contains("stdout /nonexistent/fifo"));
        let file = open(&stdio("/dev/null", "", "")).unwrap_err();
        assert!(matches!(
            file,
            Error::NotFifo {
                stream: "stdin",
                ..
            }
        ));
    }
}
