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
const EVERY: Duration = Duration::from_secs(2);
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
    /// Bytes of the directory's files, counted when there is something to tell.
    total: Option<u64>,
    started: Instant,
}

impl<'a> Progress<'a> {
    pub(super) const EVERY: Duration = EVERY;

    pub(super) fn new(directory: &'a Path, image: &'a File) -> Self {
        Self {
            directory,
            image,
            total: None,
            started: Instant::now(),
        }
    }

    pub(super) fn tell(&mut self) {
        let total = *self.total.get_or_insert_with(|| content(self.directory));
        let written = self
            .image
            .metadata()
            .map_or(0, |image| image.blocks() * 512);
        tracing::info!(
            layer = %self.directory.display(),
            mib = written >> 20,
            of_mib = total >> 20,
            seconds = self.started.elapsed().as_secs(),
            "Making an image"
        );
    }
}

/// Bytes of all files below `directory`, each counted once; what can't be read isn't.
fn content(directory: &Path) -> u64 {
    let (mut total, mut linked) = (0_u64, HashSet::new());
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
                total = total.saturating_add(found.len());
            }
        }
    }
    total
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
        assert_eq!(content(root.path()), 1024);
        let image = File::create(path("image")).unwrap();
        let mut progress = Progress::new(root.path(), &image);
        progress.tell();
        assert_eq!(progress.total, Some(1024));
    }
}
