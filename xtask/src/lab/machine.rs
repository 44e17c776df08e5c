//! The lab's QEMU: a machine whose emulated processor has virtualization, so that its Linux has a KVM.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::files;
use super::image::{self, Image};
use super::model::{Gic, Model};
use super::qemu;
use crate::arch::Arch;
use crate::containerd::Version;
use crate::paths;

/// How much of its console is shown: a kernel's oops, and what led to it.
const CONSOLE_LINES: usize = 80;
/// The exchange disk: what a run brings along. Sparse.
const EXCHANGE_SIZE: u64 = 12 << 30;

/// How the processors of a lab run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Two, on one thread where threads of their own are known to break the lab.
    #[default]
    Steady,
    /// Two with a thread each: for figures in wall time.
    Parallel,
    /// One whose clock counts instructions: figures that repeat.
    Counted,
}

/// How a lab is to be.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) arch: Arch,
    /// As QEMU's `-m` takes it.
    pub(super) memory: String,
    /// The containerd that its init starts.
    pub(super) containerd: Version,
    pub(super) pace: Pace,
    pub(super) gic: Gic,
}

/// A running lab, known by its folder.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Lab {
    pub(super) dir: PathBuf,
    pub(super) pid: i32,
    /// The helper in it: another build's wants another lab.
    pub(super) helper: String,
    pub(super) containerd: Version,
}

/// A lab of this process; it ends with it.
#[derive(Debug)]
pub(super) struct OwnLab {
    pub(super) lab: Lab,
    child: Child,
    _dir: TempDir,
}

impl Drop for OwnLab {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Lab {
    pub(super) fn channel(&self) -> PathBuf {
        self.dir.join("channel.sock")
    }

    pub(super) fn exchange(&self) -> PathBuf {
        self.dir.join("exchange.img")
    }

    /// The end of what the lab wrote to its serial console.
    pub(super) fn console_tail(&self) -> String {
        let text = fs::read(self.dir.join("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines
            .get(lines.len().saturating_sub(CONSOLE_LINES)..)
            .unwrap_or_default()
            .join("\n")
    }

    /// Whether its QEMU still runs (and the pid is not another's by now).
    pub(super) fn alive(&self) -> bool {
        let line = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let dir = self.dir.to_string_lossy().into_owned();
        String::from_utf8_lossy(&line).contains(&dir)
    }

    /// Ends it and removes its folder.
    pub(super) fn end(&self) -> Result<()> {
        if self.alive() {
            let pid = nix::unistd::Pid::from_raw(self.pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                .context("cannot end the lab")?;
        }
        paths::remove_dir(&self.dir)
    }
}

/// Identifies the helper (this very program, or what it is for another processor) that a lab was
/// started with.
pub(super) fn helper(arch: Arch) -> Result<String> {
    let exe = files::helper(arch)?;
    let meta = fs::metadata(&exe).context("cannot look at this program")?;
    let changed = meta.modified().context("no modification time")?;
    Ok(format!("{} {} {changed:?}", exe.display(), meta.len()))
}

/// Starts a lab that ends with this process.
pub(super) fn start_own(shape: &Shape) -> Result<OwnLab> {
    let dir = tempfile::Builder::new()
        .prefix("supermachine-lab-")
        .tempdir()
        .context("cannot make a folder for the lab")?;
    // QEMU gets SIGKILL when this thread, the main one, ends for whatever reason.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    let child = spawn(command, dir.path(), shape)?;
    let lab = describe(dir.path(), &child, shape)?;
    Ok(OwnLab {
        lab,
        child,
        _dir: dir,
    })
}

/// Starts a lab that stays until [`Lab::end`].
pub(super) fn start_detached(shape: &Shape) -> Result<Lab> {
    let dir = tempfile::Builder::new()
        .prefix("supermachine-lab-")
        .tempdir()
        .context("cannot make a folder for the lab")?;
    let command = Command::new("setsid");
    let child = spawn(command, dir.path(), shape)?;
    let lab = describe(dir.path(), &child, shape)?;
    let _ = dir.keep();
    Ok(lab)
}

fn describe(dir: &Path, child: &Child, shape: &Shape) -> Result<Lab> {
    let pid = i32::try_from(child.id()).context("a pid out of range")?;
    Ok(Lab {
        dir: dir.to_path_buf(),
        pid,
        helper: helper(shape.arch)?,
        containerd: shape.containerd,
    })
}

/// Starts QEMU by `launcher`, which replaces itself by it.
fn spawn(mut launcher: Command, dir: &Path, shape: &Shape) -> Result<Child> {
    let model = Model::of(shape.arch);
    let program = qemu::program(model, dir)?;
    let image = image::ensure(model)?;
    let initramfs = dir.join("initramfs.cpio");
    files::initramfs(&image.initramfs, shape.arch, dir, &initramfs)?;
    File::create(dir.join("exchange.img"))
        .and_then(|file| file.set_len(EXCHANGE_SIZE))
        .context("cannot make the exchange disk")?;

    let log = File::create(dir.join("qemu.log")).context("cannot make QEMU's log")?;
    launcher
        .arg(program.path)
        .args(arguments(&image, dir, shape, program.mended))
        .arg("-initrd")
        .arg(&initramfs)
        // snapshot=on keeps what the lab writes in a deleted file there.
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot start QEMU")
}

fn arguments(image: &Image, dir: &Path, shape: &Shape, mended: bool) -> Vec<String> {
    let path = |name: &str| dir.join(name).display().to_string();
    let mut args: Vec<String> = Vec::new();
    let mut add = |items: &[&str]| args.extend(items.iter().map(|item| (*item).to_owned()));
    // With a thread for each processor a lab of x86_64 breaks now and then; on a common one they are
    // kicked to take turns, which breaks guests of one that isn't mended (docs/limitations.md,
    // "Host").
    let (threads, processors) = match shape.pace {
        Pace::Steady if mended => ("single", "2"),
        Pace::Steady | Pace::Parallel => ("multi", "2"),
        Pace::Counted => ("single", "1"),
    };
    add(&["-accel", &format!("tcg,thread={threads},tb-size=1024")]);
    add(&["-smp", processors]);
    if shape.pace == Pace::Counted {
        add(&["-icount", "shift=0,sleep=off"]);
    }
    let model = Model::of(shape.arch);
    add(&[
        "-machine",
        &model.machine(shape.gic),
        "-cpu",
        model.processor,
    ]);
    add(&["-m", &shape.memory]);
    add(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    add(&["-serial", &format!("file:{}", path("console.log"))]);
    add(&[
        "-kernel",
        &image.kernel.display().to_string(),
        "-append",
        &format!(
            "{} lab.containerd={}",
            model.command_line,
            shape.containerd.name()
        ),
    ]);
    let root = format!(
        "file={},format=raw,if=none,id=root,snapshot=on,cache=unsafe",
        image.disk.display()
    );
    add(&["-drive", &root, "-device", "virtio-blk-pci,drive=root"]);
    let exchange = format!(
        "file={},format=raw,if=none,id=ex,cache=unsafe",
        path("exchange.img")
    );
    add(&["-drive", &exchange, "-device", "virtio-blk-pci,drive=ex"]);
    add(&["-device", "virtio-serial-pci,max_ports=2"]);
    let channel = format!(
        "socket,id=ch,path={},server=on,wait=off",
        path("channel.sock")
    );
    add(&["-chardev", &channel]);
    add(&[
        "-device",
        &format!("virtserialport,chardev=ch,name={}", super::channel::PORT),
    ]);
    args
}
