//! Word in the log of images that take long, and an end to programs that come to none.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::sys;

/// How often a program is looked at, and when it is given up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// How often there is word.
    every: Duration,
    /// How long one may do nothing: use no processor time and write nothing.
    still: Duration,
    /// The same once it has complained.
    complained: Duration,
}

/// Programs wait for nobody but a disk. One that has complained is not waiting for that: some
/// versions of mkfs.erofs stay after an error, their threads waiting for each other.
pub(super) const PACE: Pace = Pace {
    every: Duration::from_secs(2),
    still: Duration::from_secs(120),
    complained: Duration::from_secs(10),
};

/// What is kept of a program's errors: its last words are what counts.
const WORDS_MAX: usize = 16 << 10;

/// How a program ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// Its errors.
    pub(super) words: String,
    /// How long it had done nothing when it was killed for that.
    pub(super) still: Option<Duration>,
}

/// Runs a program to its end, and has `written` called after every so often that it takes, which
/// tells how many bytes it has written. One that does nothing any more is killed.
pub(super) fn run(
    command: &mut Command,
    pace: Pace,
    written: impl FnMut() -> u64,
) -> io::Result<Ended> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut words = Vec::new();
    let still = listen(&mut child, pace, &mut words, written).unwrap_or_default();
    if still.is_some() {
        child.kill()?;
    }
    Ok(Ended {
        status: child.wait()?,
        words: String::from_utf8_lossy(&words).into_owned(),
        still,
    })
}

/// Until the program closes its errors, which is when it ends, or has stood still for too long.
fn listen(
    child: &mut Child,
    pace: Pace,
    words: &mut Vec<u8>,
    mut written: impl FnMut() -> u64,
) -> io::Result<Option<Duration>> {
    let Some(mut pipe) = child.stderr.take() else {
        return Ok(None);
    };
    let limit = Timespec::try_from(pace.every).map_err(io::Error::other)?;
    let mut chunk = [0; 4096];
    let (mut done, mut still) = (None, Duration::ZERO);
    loop {
        match poll(
            &mut [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)],
            Some(&limit),
        ) {
            Ok(0) => {
                let now = Some((sys::processor_time(child.id()), written()));
                still = if now == done {
                    still + pace.every
                } else {
                    Duration::ZERO
                };
                done = now;
                let limit = match words.is_empty() {
                    true => pace.still,
                    false => pace.complained.min(pace.still),
                };
                if still >= limit {
                    return Ok(Some(still));
                }
                continue;
            }
            Err(Errno::INTR) => continue,
            other => other?,
        };
        match pipe.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(count) => words.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        let over = words.len().saturating_sub(WORDS_MAX);
        words.drain(..over);
    }
}

/// Tells of an image of `directory` that grows in `image`.
pub(super) struct Progress<'a> {
    pub(super) directory: &'a Path,
    pub(super) image: &'a File,
    /// Bytes of the directory's files.
    total: u64,
    started: Instant,
}

impl<'a> Progress<'a> {
    pub(super) fn new(directory: &'a Path, image: &'a File, total: u64) -> Self {
        Self {
            directory,
            image,
            total,
            started: Instant::now(),
        }
    }

    /// Word of it in the log; answers the bytes there are.
    pub(super) fn tell(&self) -> u64 {
        let written = self
            .image
            .metadata()
            .map_or(0, |image| image.blocks() * 512);
        tracing::info!(
            layer = %self.directory.display(),
            mib = written >> 20,
            of_mib = self.total >> 20,
            seconds = self.started.elapsed().as_secs(),
            "Making an image"
        );
        written
    }
}

/// How much is in the files of a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// Bytes of all files, holes included.
    pub(super) bytes: u64,
    /// Bytes that take no space where they are.
    pub(super) holes: u64,
}

impl Content {
    /// Of all files below `directory`, each counted once; what can't be read isn't.
    pub(super) fn of(directory: &Path) -> Self {
        let (mut content, mut linked) = (Self::default(), HashSet::new());
        let mut left = vec![directory.to_path_buf()];
        while let Some(directory) = left.pop() {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                // Of the entry itself, not of what a link leads to.
                let Ok(found) = entry.metadata() else {
                    continue;
                };
                if found.is_dir() {
                    left.push(entry.path());
                } else if found.is_file() && (found.nlink() < 2 || linked.insert(found.ino())) {
                    let kept = found.blocks().saturating_mul(512);
                    let holes = found.len().saturating_sub(kept);
                    content.bytes = content.bytes.saturating_add(found.len());
                    content.holes = content.holes.saturating_add(holes);
                }
            }
        }
        content
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn long_work_is_told_of_and_short_work_is_not() {
        let mut told = 0;
        let hour = Duration::from_secs(3600);
        let pace = Pace {
            every: hour,
            still: hour,
            complained: hour,
        };
        let tell = || {
            told += 1;
            0
        };
        let ended = run(&mut sh("echo no >&2; exit 3"), pace, tell).unwrap();
        assert_eq!((ended.status.code(), told), (Some(3), 0));
        assert_eq!((ended.words.as_str(), ended.still), ("no\n", None));
        // It goes on until it is told of.
        let directory = tempfile::tempdir().unwrap();
        let mark = directory.path().join("told");
        let mut command = sh("until test -e \"$0\"; do sleep 0.01; done");
        command.arg(&mark);
        let pace = Pace {
            every: Duration::from_millis(1),
            ..pace
        };
        let tell = || {
            std::fs::write(&mark, "").unwrap();
            0
        };
        let ended = run(&mut command, pace, tell).unwrap();
        assert!(
            ended.status.success() && ended.words.is_empty(),
            "{ended:?}"
        );
    }

    #[test]
    fn what_stands_still_is_killed_and_sooner_after_an_error() {
        let every = Duration::from_millis(50);
        let hour = Duration::from_secs(3600);
        for (script, still, words) in [
            ("echo full >&2; sleep 1000", hour, "full\n"),
            ("sleep 1000", Duration::from_millis(200), ""),
        ] {
            let pace = Pace {
                every,
                still,
                complained: every,
            };
            let ended = run(&mut sh(&format!("exec sh -c '{script}'")), pace, || 0).unwrap();
            assert_eq!(ended.status.signal(), Some(9), "{script}");
            assert!(ended.still.is_some_and(|still| still >= every), "{ended:?}");
            assert_eq!(ended.words, words);
        }
        // Writing is doing something, and so is computing.
        let mut bytes = 0;
        let writes = || {
            bytes += 1;
            bytes
        };
        let pace = Pace {
            every,
            still: every * 4,
            complained: every,
        };
        let ended = run(&mut sh("sleep 0.5"), pace, writes).unwrap();
        assert!(ended.status.success() && ended.still.is_none(), "{ended:?}");
        let pace = Pace {
            every: every * 4,
            still: every * 4,
            complained: every * 4,
        };
        let count = "echo w >&2; n=0; while test $n -lt 300000; do n=$((n+1)); done";
        let ended = run(&mut sh(count), pace, || 0).unwrap();
        assert!(ended.status.success() && ended.still.is_none(), "{ended:?}");
    }

    #[test]
    fn only_last_words_are_kept() {
        let mut command = sh("head -c 100000 /dev/zero | tr '\\0' x >&2; echo last >&2");
        let words = run(&mut command, PACE, || 0).unwrap().words;
        assert!(words.len() <= WORDS_MAX && words.ends_with("xlast\n"));
    }

    #[test]
    fn content_is_counted_once() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        std::fs::create_dir(path("d")).unwrap();
        std::fs::write(path("d/a"), [0; 1000]).unwrap();
        std::fs::hard_link(path("d/a"), path("b")).unwrap();
        std::os::unix::fs::symlink("d/a", path("c")).unwrap();
        std::fs::write(path("e"), [0; 24]).unwrap();
        assert_eq!(Content::of(root.path()).bytes, 1024);
        let sparse = File::create(path("sparse")).unwrap();
        sparse.set_len(1 << 20).unwrap();
        let content = Content::of(root.path());
        assert_eq!(content.bytes, (1 << 20) + 1024);
        assert!(content.holes >= 1 << 20, "{content:?}");
    }
}
