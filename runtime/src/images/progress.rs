//! Word in the log of images that take long.

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

/// How often there is word.
pub(super) const EVERY: Duration = Duration::from_secs(2);
/// What is kept of a program's errors: its last words are what counts.
const WORDS_MAX: usize = 16 << 10;

/// Runs a program to its end, and has `tell` called after every `EVERY` that it takes. Its errors
/// are in the answer.
pub(super) fn run(
    command: &mut Command,
    every: Duration,
    mut tell: impl FnMut(),
) -> io::Result<(ExitStatus, String)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let words = listen(&mut child, every, &mut tell).unwrap_or_default();
    Ok((child.wait()?, String::from_utf8_lossy(&words).into_owned()))
}

/// Until the program closes its errors, which is when it ends.
fn listen(child: &mut Child, every: Duration, tell: &mut dyn FnMut()) -> io::Result<Vec<u8>> {
    let Some(mut pipe) = child.stderr.take() else {
        return Ok(Vec::new());
    };
    let limit = Timespec::try_from(every).map_err(io::Error::other)?;
    let (mut words, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match poll(
            &mut [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)],
            Some(&limit),
        ) {
            Ok(0) => {
                tell();
                continue;
            }
            Err(Errno::INTR) => continue,
            other => other?,
        };
        match pipe.read(&mut chunk) {
            Ok(0) => return Ok(words),
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

    pub(super) fn tell(&self) {
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
    use super::*;

    #[test]
    fn long_work_is_told_of_and_short_work_is_not() {
        let run = |script: &str, every: Duration| {
            let mut told = 0;
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            let (status, words) = run(&mut command, every, || told += 1).unwrap();
            (status.code(), words, told)
        };
        let short = run("echo no >&2; exit 3", Duration::from_secs(600));
        assert_eq!(short, (Some(3), "no\n".to_owned(), 0));
        // It goes on until it is told of.
        let directory = tempfile::tempdir().unwrap();
        let mark = directory.path().join("told");
        let mut command = Command::new("sh");
        command
            .args(["-c", "until test -e \"$0\"; do sleep 0.01; done"])
            .arg(&mark);
        let tell = || std::fs::write(&mark, "").unwrap();
        let (status, words) = super::run(&mut command, Duration::from_millis(1), tell).unwrap();
        assert!(status.success() && words.is_empty(), "{status}: {words}");
    }

    #[test]
    fn only_last_words_are_kept() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "head -c 100000 /dev/zero | tr '\\0' x >&2; echo last >&2",
        ]);
        let (_, words) = run(&mut command, EVERY, || ()).unwrap();
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
