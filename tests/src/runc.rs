//! runc by itself: what containers here are compared with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::fifo::Fifo;
use crate::program::{Finished, Program};
use crate::terminal::Terminal;

/// A container of runc's, on an overlay of the image's files. Dropping it removes both.
#[derive(Debug)]
pub struct Runc {
    id: String,
    dir: PathBuf,
    deadline: Duration,
}

impl Runc {
    /// Runs `bundle`'s program in the background, its output going to `stdout`.
    ///
    /// # Errors
    /// The root file system can't be mounted, or what runc says.
    pub fn run(bundle: &Bundle, id: &str, stdout: &Fifo, deadline: Duration) -> Result<Self> {
        let runc = Self {
            id: id.to_owned(),
            dir: bundle.dir.clone(),
            deadline,
        };
        let layer = |name: &str| {
            let path = bundle.dir.join(name);
            fs::create_dir_all(&path).map(|()| path)
        };
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            bundle.files.display(),
            layer("upper")?.display(),
            layer("work")?.display()
        );
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "overlay", "-o", &options, "overlay"])
            .arg(runc.root());
        Program::run(mount, deadline)?.success()?;
        let mut command = runc.command(&["run", "--detach", "--bundle"]);
        command.arg(&bundle.dir).arg(id);
        let log = bundle.dir.join("runc.err");
        let status = command
            .stdin(std::process::Stdio::null())
            .stdout(stdout.writer()?)
            .stderr(fs::File::create(&log)?)
            .status()
            .context("execute runc")?;
        anyhow::ensure!(
            status.success(),
            "runc: {status}: {}",
            fs::read_to_string(&log)?
        );
        Ok(runc)
    }

    fn root(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    fn command(&self, action: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command
            .arg("--root")
            .arg(self.dir.join("state"))
            .args(action);
        command
    }

    fn exec_command(&self, process: &Value) -> Result<Command> {
        let file = self.dir.join("process.json");
        fs::write(&file, process.to_string())?;
        let mut command = self.command(&["exec", "--process"]);
        command.arg(file).arg(&self.id);
        Ok(command)
    }

    /// Runs an OCI process in it to its end.
    ///
    /// # Errors
    /// It didn't end in time.
    pub fn exec(&self, process: &Value) -> Result<Finished> {
        Program::run(self.exec_command(process)?, self.deadline)
    }

    /// Runs an OCI process in it whose terminal has this size; its first line.
    ///
    /// # Errors
    /// There was none in time.
    pub fn exec_in_terminal(&self, process: &Value, columns: u16, rows: u16) -> Result<String> {
        let command = self.exec_command(process)?;
        let mut terminal = Terminal::start(&command, columns, rows, self.deadline)?;
        let line = terminal.expect("\n")?;
        terminal.finish()?;
        Ok(line)
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let delete = self.command(&["delete", "--force", &self.id]);
        let _ = Program::run(delete, self.deadline);
        let mut umount = Command::new("umount");
        umount.arg(self.root());
        let _ = Program::run(umount, self.deadline);
    }
}

/// Whether `runc` is there to compare with.
pub fn is_there() -> bool {
    Path::new("/usr/sbin/runc").exists() || Path::new("/usr/bin/runc").exists()
}
