//! What `make demo` shows once everything is built: containers in microVMs under a containerd of
//! their own.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::{Ctr, Output};
use supermachine_tests::step::{say, step};
use supermachine_tests::{BUSYBOX, DEBIAN, RUNTIME};

/// What a kernel drew when it started: the release can be the host's own, this can't.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel a container sees, in the words of a shell.
const KERNEL: &str = "kernel $(uname -r), boot $(cat /proc/sys/kernel/random/boot_id)";

/// Runs containers in microVMs and shows what they print.
#[derive(Debug, Parser)]
struct Args {
    /// Folder with busybox.tar and debian.tar, OCI archives
    #[arg(long)]
    images: PathBuf,
    /// containerd to start, unless one is named by --containerd-address
    #[arg(long, default_value = "containerd")]
    containerd: PathBuf,
    /// Socket of a running containerd to use, one with the images already imported
    #[arg(long)]
    containerd_address: Option<PathBuf>,
    /// ctr to drive it with
    #[arg(long, default_value = "ctr")]
    ctr: PathBuf,
    /// Runtime to run with
    #[arg(long, default_value = RUNTIME)]
    runtime: String,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (own, address) = match args.containerd_address {
        Some(address) => (None, address),
        None => {
            let containerd = step("containerd with its own root, state and socket", || {
                Containerd::start(&args.containerd, &[])
            })?;
            let address = containerd.address();
            (Some(containerd), address)
        }
    };
    let demo = Demo {
        ctr: Ctr::new(&args.ctr, &address),
        runtime: args.runtime,
    };
    let import = |name: &str, file: &str| match own {
        Some(_) => step(&format!("import {name}"), || {
            demo.ctr.import(&args.images.join(file))
        }),
        None => Ok(()),
    };

    import("a busybox image", "busybox.tar")?;
    step("a busybox container in its microVM", || {
        demo.run(
            BUSYBOX,
            &format!("echo \"hello from busybox, {KERNEL}, $(nproc) vCPU, pid $$\""),
        )
    })?;
    import("a Debian image", "debian.tar")?;
    step("a Debian container in its microVM", || {
        demo.run(
            DEBIAN,
            &format!("echo \"hello from Debian $(cat /etc/debian_version), {KERNEL}\""),
        )
    })?;
    step("exec into a detached container", || demo.exec_detached())?;
    next(&demo.runtime);
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
        let script = format!("echo \"hello from an exec, {KERNEL}, beside:\"; ps -o pid,args");
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
                &script,
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
    let boot = std::fs::read_to_string(BOOT_ID).context("no boot id")?;
    let boot = boot.trim();
    say(&format!(
        "    the host has kernel {host}, boot {boot}; first output after {}",
        milliseconds(first)
    ));
    if output.text().contains(boot) {
        bail!("the container saw the host's kernel: it did not run in a microVM");
    }
    Ok(())
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

fn next(runtime: &str) {
    say("Next: `make lab` is a shell where these work (on a host with its own KVM: any shell,");
    say("once this build is installed as README.md says):");
    for command in [
        format!("ctr run --rm -t --runtime {runtime} {BUSYBOX} one sh"),
        format!(
            "ctr run -d --memory-limit 268435456 --cpus 2 --runtime {runtime} {DEBIAN} two sleep 1000"
        ),
        "ctr task exec -t --exec-id e1 two bash".to_owned(),
        "ctr task kill -s KILL two; ctr task rm two; ctr container rm two".to_owned(),
        "supermachine check".to_owned(),
    ] {
        say(&format!("    {command}"));
    }
    say("Clean up: nothing of this demo is left running. `make clean` removes what was built;");
    say("~/.cache/supermachine holds kernel, images and lab for the next time.");
}
