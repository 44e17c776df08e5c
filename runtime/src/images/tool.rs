//! The programs images are made with.
//!
//! They end with whoever runs them, however that ends: this program is executed again, asks the
//! kernel for that, and becomes the tool.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};

use super::Error;
use super::progress::{self, Ended};
use crate::sys;

pub(crate) const MKFS_EROFS: Tool = Tool {
    program: "mkfs.erofs",
    package: "erofs-utils",
};
pub(crate) const MKFS_EXT4: Tool = Tool {
    program: "mkfs.ext4",
    package: "e2fsprogs",
};

/// `argv[0]` of what becomes a tool.
const ARG0: &str = "supermachine-tool";

/// Whether this program, executed again, becomes one.
static BECOMES: AtomicBool = AtomicBool::new(false);

/// Becomes a tool if this program was executed to, and answers an exit status if that fails.
pub(crate) fn child() -> Option<ExitCode> {
    let mut args = env::args_os();
    if args.next().is_none_or(|name| name != ARG0) {
        BECOMES.store(sys::PROGRAM.is_some(), Ordering::Relaxed);
        return None;
    }
    let error = follow(args);
    // Read by the one that started us.
    let _ = io::Write::write_all(&mut io::stderr(), format!("{error}\n").as_bytes());
    Some(ExitCode::FAILURE)
}

/// Executes the tool; what it answers is why it couldn't.
fn follow(mut args: impl Iterator<Item = OsString>) -> io::Error {
    let parent = args
        .next()
        .and_then(|parent| parent.to_str()?.parse().ok())
        .unwrap_or(0);
    let Some(program) = args.next() else {
        return io::ErrorKind::InvalidInput.into();
    };
    match sys::end_with(parent) {
        Ok(()) => Command::new(program).args(args).exec(),
        Err(error) => error,
    }
}

/// A program images are made with.
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

impl Tool {
    /// A command that ends with the thread that starts it.
    pub(crate) fn command(&self) -> Command {
        let found = self.path();
        match (found, sys::PROGRAM) {
            (Some(path), Some(program)) if BECOMES.load(Ordering::Relaxed) => {
                let mut command = Command::new(program);
                let parent = std::process::id().to_string();
                command.arg0(ARG0).arg(parent).arg(path);
                command
            }
            (Some(path), _) => Command::new(path),
            // Starting it says what is wrong.
            (None, _) => Command::new(self.program),
        }
    }

    /// containerd's PATH may lack the directories administrators' tools are in.
    fn path(&self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let more = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
        env::split_paths(&path)
            .chain(more)
            .map(|directory| directory.join(self.program))
            .find(|path| path.is_file())
    }

    /// Runs one to its end. `about` is what an error names; `written`, called while it takes long,
    /// tells how many bytes it has written.
    pub(super) fn run(
        &self,
        mut command: Command,
        about: &Path,
        written: impl FnMut() -> u64,
    ) -> Result<(), Error> {
        let ended = progress::run(&mut command, progress::PACE, written);
        let Ended {
            status,
            words,
            still,
        } = ended.map_err(|source| Error::Missing {
            program: self.program,
            package: self.package,
            source,
        })?;
        if status.success() {
            return Ok(());
        }
        let said = words.lines().rev().find(|line| !line.trim().is_empty());
        let reason = match (said, still) {
            (Some(said), _) => said.to_owned(),
            (None, Some(still)) => format!("killed, as it did nothing for {still:?}"),
            (None, None) => status.to_string(),
        };
        Err(Error::Mkfs {
            program: self.program,
            path: about.to_path_buf(),
            reason,
        })
    }
}
