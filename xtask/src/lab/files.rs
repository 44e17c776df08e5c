//! The lab's own files: its initramfs, and what that puts over the root disk at each start, so
//! that a change of them needs no new disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::kernel::stock;
use crate::step::{call, quiet};
use crate::{apt, build, containerd, cross};

const BOOT: &str = include_str!("boot.sh");
const INIT: &str = include_str!("init.sh");
/// busybox init reaps what is left behind; the helper's end is the lab's.
const INITTAB: &str = "::sysinit:/usr/lib/lab/boot\n::once:/usr/lib/lab/helper\n";
const HELPER: &str = "#!/bin/sh\n/run/lab/xtask lab-guest > /dev/console 2>&1\npoweroff -f\n";

/// Files put over what the packages leave, with their modes.
const FILES: &[(&str, u32, &str)] = &[
    ("usr/lib/lab/boot", 0o755, BOOT),
    ("usr/lib/lab/helper", 0o755, HELPER),
    ("etc/inittab", 0o644, INITTAB),
    ("etc/containerd/config.toml", 0o644, containerd::CONFIG),
    ("etc/hostname", 0o644, "lab\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost lab\n"),
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\n",
    ),
    (
        "etc/group",
        0o644,
        "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    ),
    (
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nhosts: files dns\n",
    ),
    ("etc/fstab", 0o644, ""),
];

/// The part of the initramfs that changes with the image: busybox and the modules that find the
/// root disk.
pub(super) fn base_initramfs(tree: &Path, busybox: &Path, work: &Path, to: &Path) -> Result<()> {
    let modules = work.join("modules");
    stock::collect(tree, &["virtio_pci", "virtio_blk", "ext4"], &modules)?;
    let mut archive = Archive::default();
    for dir in ["bin", "modules", "dev"] {
        archive.dir(dir)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.copy("bin/busybox", 0o755, busybox)?;
    let list = fs::read_to_string(modules.join("modules.list")).context("no modules.list")?;
    for name in list.lines().chain(["modules.list"]) {
        archive.copy(&format!("modules/{name}"), 0o644, &modules.join(name))?;
    }
    fs::write(to, archive.finish()?).context("cannot write the lab's initramfs")
}

/// The program that is the lab's side of the channel: this one, or as it is for another processor,
/// built now.
pub(super) fn helper(arch: Arch) -> Result<PathBuf> {
    if !arch.is_foreign() {
        return std::env::current_exe().context("cannot find this program");
    }
    call(cross::cargo("build", arch)?.args(["-q", "-p", "xtask"]))?;
    Ok(build::built(arch, "xtask"))
}

/// The initramfs of a run: the base with the lab's files and this program appended; the kernel
/// unpacks one archive after another.
pub(super) fn initramfs(base: &Path, arch: Arch, work: &Path, to: &Path) -> Result<()> {
    let stripped = work.join("xtask");
    apt::ensure(&["binutils"])?;
    quiet(
        Command::new(arch.tool("strip"))
            .arg("-s")
            .arg(helper(arch)?)
            .arg("-o")
            .arg(&stripped),
    )?;
    let mut archive = Archive::default();
    archive.copy("xtask", 0o755, &stripped)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let mut made = vec![String::new()];
    for (name, mode, contents) in FILES {
        let path = format!("files/{name}");
        for (end, _) in path.match_indices('/') {
            let dir = path.get(..end).unwrap_or_default().to_owned();
            if !made.contains(&dir) {
                archive.dir(&dir)?;
                made.push(dir);
            }
        }
        archive.file(&path, *mode, contents.as_bytes())?;
    }
    let mut bytes = fs::read(base).context("cannot read the lab's initramfs")?;
    bytes.extend(archive.finish()?);
    fs::write(to, bytes).context("cannot write the run's initramfs")
}
