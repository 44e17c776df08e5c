//! What `make demo` shows once everything is built: containers in microVMs under a containerd of
//! their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::{Ctr, Output};
use supermachine_tests::step::{say, step};
use supermachine_tests::{BUSYBOX, DEBIAN, RUNTIME};

/// Runs containers in microVMs and shows what they print.
#[derive(Debug, Parser)]
struct Args {
    /// Folder with busybox.tar and debian.tar, OCI archives
    #[arg(long)]
    images: PathBuf,
    /// containerd to start
    #[arg(long, default_value = "containerd")]
    containerd: PathBuf,
    /// ctr to drive it with
    #[arg(long, default_value = "ctr")]
    ctr: PathBuf,
    /// Runtime to run with
    #[arg(long, default_value = RUNTIME)]
    runtime: String,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let containerd = step("containerd with its own root, state and socket", || {
        Containerd::start(&args.containerd, &[])
    })?;
    let ctr = Ctr::new(&args.ctr, containerd.address());
    let demo = Demo {
        ctr,
        runtime: args.runtime.clone(),
    };

    step("import a busybox image", || {
        demo.ctr.import(&args.images.join("busybox.tar"))
    })?;
    step("a busybox container in its microVM", || {
        demo.run(
            BUSYBOX,
            "echo \"hello from busybox, kernel $(uname -r), $(nproc) vCPU, pid $$\"",
        )
    })?;
    step("import a Debian image", || {
        demo.ctr.import(&args.images.join("debian.tar"))
    })?;
    step("a Debian container in its microVM", || {
        demo.run(
            DEBIAN,
            "echo \"hello from Debian $(cat /etc/debian_version), kernel $(uname -r)\"",
        )
    })?;
    step("exec into a detached container", || demo.exec_detached())?;
    next(&containerd, &args.runtime);
    Ok(())
}

struct Demo {
    ctr: Ctr,
    runtime: String,
}

impl Demo {
    fn run(&self, image: &str, script: &str) -> Result<()> {
        let output = self
            .ctr
            .output([
                "run",
                "--rm",
                "--runtime",
                &self.runtime,
                image,
                "demo",
                "sh",
                "-c",
                script,
            ])?
            .success()?;
        show(&output)
    }

    fn exec_detached(&self) -> Result<()> {
        let runtime = self.runtime.as_str();
        self.ctr
            .output([
                "run",
                "-d",
                "--runtime",
                runtime,
                BUSYBOX,
                "demo",
                "sleep",
                "1000",
            ])?
            .success()?;
        let script = "echo \"hello from an exec, kernel $(uname -r), beside:\"; ps -o pid,args";
        let exec = self
            .ctr
            .output([
                "task",
                "exec",
                "--exec-id",
                "one",
                "demo",
                "sh",
                "-c",
                script,
            ])
            .and_then(Output::success)
            .and_then(|output| show(&output));
        self.ctr
            .output(["task", "kill", "--signal", "KILL", "demo"])?
            .success()?;
        self.ctr.output(["task", "delete", "--force", "demo"])?;
        self.ctr
            .output(["container", "delete", "demo"])?
            .success()?;
        exec
    }
}

/// Prints what a container printed, the kernels, and how long the first byte took.
fn show(output: &Output) -> Result<()> {
    for line in output.text().lines() {
        say(&format!("    | {line}"));
    }
    let first = output
        .first_output
        .context("the container printed nothing")?;
    let host = nix::sys::utsname::uname().context("no uname")?;
    let host = host.release().to_string_lossy().into_owned();
    say(&format!(
        "    the host's kernel is {host}; first output after {}",
        milliseconds(first)
    ));
    if output.text().contains(&host) {
        bail!("the container saw the host's kernel: it did not run in a microVM");
    }
    Ok(())
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

fn next(containerd: &Containerd, runtime: &str) {
    let address = Path::new("/run/containerd/containerd.sock");
    say("Next, with a containerd that stays (yours at its usual socket, or one started by hand):");
    say(&format!(
        "    ctr run --rm -t --runtime {runtime} {BUSYBOX} one sh"
    ));
    say(&format!(
        "    ctr run -d --memory-limit 268435456 --cpus 2 --runtime {runtime} {DEBIAN} two sleep 1000"
    ));
    say("    ctr task exec -t --exec-id e1 two bash");
    say("    supermachine check");
    say(&format!(
        "    (ctr finds containerd at {}; --address names another)",
        address.display()
    ));
    say("Clean up: nothing is left of this demo; its containerd and files go now");
    say(&format!(
        "    ({}). `make clean` removes what was built; the cache says where it is.",
        containerd.root().display()
    ));
}
