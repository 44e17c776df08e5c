//! Containers as a user starts them, on our runtime and on runc.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::{Ctr, Output};
use supermachine_tests::{BUSYBOX, RUNC, RUNTIME};

use crate::memory::{self, Idle};

/// Times from starting `ctr`.
#[derive(Debug, Default)]
pub(crate) struct Times {
    /// `ctr run --rm … echo` to its first byte.
    pub(crate) run: Vec<Duration>,
    /// The same to the end of `ctr`.
    pub(crate) run_end: Vec<Duration>,
}

/// A containerd of our own with the image in it.
#[derive(Debug)]
pub(crate) struct Host {
    ctr: Ctr,
    _containerd: Containerd,
}

impl Host {
    pub(crate) fn start(images: &Path) -> Result<Self> {
        let containerd = Containerd::start(Path::new("containerd"), &[])?;
        let ctr = Ctr::new("ctr", containerd.address());
        ctr.import(&images.join("busybox.tar"))?;
        Ok(Self {
            ctr,
            _containerd: containerd,
        })
    }

    /// Runs containers by turns on both runtimes, `count` measured times after one that isn't.
    pub(crate) fn runs(&self, count: usize) -> [Result<Times>; 2] {
        let mut times = [Ok(Times::default()), Ok(Times::default())];
        for turn in 0..=count {
            for (times, runtime) in times.iter_mut().zip([RUNTIME, RUNC]) {
                let Ok(known) = times else { continue };
                match self.run(runtime) {
                    Err(error) => *times = Err(error),
                    Ok(_) if turn == 0 => {}
                    Ok((first, end)) => {
                        known.run.push(first);
                        known.run_end.push(end);
                    }
                }
            }
        }
        times
    }

    fn run(&self, runtime: &str) -> Result<(Duration, Duration)> {
        let output = self
            .ctr
            .output([
                "run",
                "--rm",
                "--runtime",
                runtime,
                BUSYBOX,
                "bench",
                "echo",
                "hello",
            ])
            .and_then(Output::success);
        if output.is_err() {
            // A failed run may leave its container behind, and its name with it.
            let _ = self.ctr.output(["task", "delete", "--force", "bench"]);
            let _ = self.ctr.output(["container", "delete", "bench"]);
        }
        let output = output?;
        Ok((output.first_output.context("no output")?, output.total))
    }

    /// Executes in a container that sleeps; then watches that container's processes idle: our VMM
    /// and shim. runc's is its shim alone.
    pub(crate) fn sleeper(
        &self,
        runtime: &str,
        count: usize,
    ) -> Result<(Vec<Duration>, Vec<Idle>)> {
        let id = "bench-sleeper";
        self.ctr
            .output([
                "run",
                "-d",
                "--runtime",
                runtime,
                BUSYBOX,
                id,
                "sleep",
                "10000",
            ])?
            .success()?;
        let done = self.in_sleeper(runtime, id, count);
        // What can't be removed goes with the containerd.
        let _ = self.ctr.output(["task", "delete", "--force", id]);
        let _ = self.ctr.output(["container", "delete", id]);
        done
    }

    fn in_sleeper(
        &self,
        runtime: &str,
        id: &str,
        count: usize,
    ) -> Result<(Vec<Duration>, Vec<Idle>)> {
        let mut times = Vec::new();
        for turn in 0..=count {
            let name = format!("e{turn}");
            let output = self
                .ctr
                .output(["task", "exec", "--exec-id", &name, id, "echo", "hello"])?
                .success()?;
            let first = output.first_output.context("no output of an exec")?;
            if turn > 0 {
                times.push(first);
            }
        }
        let tasks = self.ctr.output(["task", "list"])?.success()?.text();
        let pid = tasks
            .lines()
            .find(|line| line.split_whitespace().next() == Some(id))
            .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .context("the sleeping task is not listed")?;
        let shim = memory::parent(pid)?;
        let watched = if runtime == RUNC {
            vec![shim]
        } else {
            vec![shim, pid]
        };
        Ok((times, memory::watch(&watched)?))
    }
}
