//! The lab's root disk and initramfs, built from packages and cached by the hash of their recipe.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::containerd::{self, Containerd};
use crate::cpio::Archive;
use crate::kernel::{Kernel, stock};
use crate::step::{hash, quiet, step};
use crate::{apt, images, paths};

/// The suite of the root disk: its erofs-utils makes images from folders and tar streams well.
const SUITE: &str = "trixie";
/// What the lab holds beside containerd.
const PACKAGES: &[&str] = &[
    "base-files",
    "bash",
    "bsdutils",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "e2fsprogs",
    "erofs-utils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "iptables",
    "kmod",
    "libc-bin",
    "login",
    "lsof",
    "mount",
    "nftables",
    "procps",
    "psmisc",
    "qemu-system-x86",
    "runc",
    "sed",
    "strace",
    "tar",
    "util-linux",
    "gawk",
    "socat",
    "xz-utils",
    "zstd",
    "seabios",
];

const BOOT: &str = include_str!("boot.sh");
const INIT: &str = include_str!("init.sh");
/// busybox init reaps what is left behind; the helper's end is the lab's.
const INITTAB: &str = "::sysinit:/usr/lib/lab/boot\n::once:/usr/lib/lab/helper\n";
const HELPER: &str = "#!/bin/sh\n/run/lab/xtask lab-guest > /dev/console 2>&1\npoweroff -f\n";

/// Files written over what the packages leave, with their modes.
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

/// The disk's size, sparse: room for images and snapshots.
const DISK_SIZE: u64 = 16 << 30;

/// The parts of a lab that all runs share.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) disk: PathBuf,
    /// The initramfs without the helper, which each run appends.
    pub(super) initramfs: PathBuf,
}

/// The lab's image, built now if the cache doesn't hold it.
pub(super) fn ensure() -> Result<Image> {
    let kernel = stock::ensure()?;
    let home = paths::cache()?.join("lab");
    let dir = home.join(key(&kernel)?);
    if !dir.join("root.img").exists() {
        let _lock = paths::lock(&home, "build")?;
        if !dir.join("root.img").exists() {
            step("lab image", || build(&home, &dir, &kernel))?;
        }
    }
    Ok(Image {
        kernel: kernel.vmlinux(),
        disk: dir.join("root.img"),
        initramfs: dir.join("initramfs.cpio"),
    })
}

fn key(kernel: &Kernel) -> Result<String> {
    let version = kernel_version(kernel)?;
    let packages = PACKAGES.join(" ");
    let mut parts = vec![SUITE, &packages, INIT, &version];
    for (name, _, contents) in FILES {
        parts.extend([*name, *contents]);
    }
    let parts: Vec<&[u8]> = parts.into_iter().map(str::as_bytes).collect();
    Ok(hash(&parts).chars().take(16).collect())
}

fn kernel_version(kernel: &Kernel) -> Result<String> {
    let version = fs::read_to_string(kernel.dir.join("version")).context("kernel version")?;
    Ok(version.trim().to_owned())
}

fn build(home: &Path, dir: &Path, kernel: &Kernel) -> Result<()> {
    apt::ensure(&["mmdebstrap", "busybox-static", "e2fsprogs", "kmod"])?;
    let work = tempfile::tempdir_in(home).context("cannot make a folder in the lab's cache")?;
    let root = work.path().join("root");
    let fresh = work.path().join("image");
    paths::make_dir(&fresh)?;

    step("lab packages", || packages(&root))?;
    // Through the same merged /usr as the rest.
    let containerd = containerd::binaries()?.join("../.");
    quiet(
        Command::new("cp")
            .arg("-a")
            .arg(containerd)
            .arg(root.join("usr")),
    )?;
    furnish(&root, kernel)?;
    if let Err(error) = step("lab images", || preload(&root, work.path())) {
        eprintln!("    runs import the images themselves ({error:#})");
    }
    step("lab root disk", || disk(&root, &fresh.join("root.img")))?;
    initramfs(kernel, work.path(), &fresh.join("initramfs.cpio"))?;

    paths::remove_dir(dir)?;
    fs::rename(&fresh, dir).with_context(|| format!("cannot make {}", dir.display()))
}

/// Packages and their dependencies, extracted and not configured: nothing of Debian runs at
/// start, so no maintainer script has to.
fn packages(root: &Path) -> Result<()> {
    let suite = apt::Suite::open(SUITE)?;
    let mut child = Command::new("mmdebstrap")
        .args(["--variant=extract", "--mode=root", "--quiet"])
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .args([
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
        ])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args([SUITE])
        .arg(root)
        .arg("-")
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start mmdebstrap")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(suite.sources()?.as_bytes())
            .context("cannot tell mmdebstrap its source")?;
    }
    let status = child.wait().context("cannot wait for mmdebstrap")?;
    if !status.success() {
        bail!("mmdebstrap: {status}");
    }
    Ok(())
}

/// Imports the images by a containerd on this host: in the lab it takes a minute.
fn preload(root: &Path, work: &Path) -> Result<()> {
    let archives = images::ensure()?;
    let containerd = Containerd::start(
        &root.join("var/lib/containerd"),
        &work.join("state"),
        &[],
        &[],
    )?;
    containerd.import(&archives)
}

/// Configuration, kernel modules and what the maintainer scripts would have made.
fn furnish(root: &Path, kernel: &Kernel) -> Result<()> {
    for (name, mode, contents) in FILES {
        let path = root.join(name);
        paths::make_dir(path.parent().context("a file without a folder")?)?;
        fs::write(&path, contents)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(*mode)))
            .with_context(|| format!("cannot write {name} of the lab"))?;
    }
    for dir in [
        "out", "mnt", "root", "proc", "sys", "dev", "run", "tmp", "var/log", "var/tmp",
    ] {
        paths::make_dir(&root.join(dir))?;
    }
    for (link, to) in [("usr/bin/awk", "gawk"), ("etc/mtab", "/proc/self/mounts")] {
        if let Err(error) = symlink(to, root.join(link))
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(error).with_context(|| format!("cannot link {link} of the lab"));
        }
    }
    // iptables comes by Debian's alternatives, which are not set up here.
    for name in ["iptables", "ip6tables", "iptables-save", "iptables-restore"] {
        let link = root.join("usr/sbin").join(name);
        if !link.exists() {
            symlink("xtables-nft-multi", &link).with_context(|| format!("cannot link {name}"))?;
        }
    }
    for dir in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "var/cache/apt",
        "var/lib/apt",
    ] {
        paths::remove_dir(&root.join(dir))?;
    }
    let modules = root.join("usr/lib/modules");
    paths::make_dir(&modules)?;
    let version = kernel_version(kernel)?;
    let from = kernel.dir.join("lib/modules").join(version);
    quiet(Command::new("cp").arg("-a").arg(from).arg(&modules))
}

/// The root folder as a sparse ext4 image. No journal: a lab's disk never outlives its run.
fn disk(root: &Path, image: &Path) -> Result<()> {
    let file = File::create(image).context("cannot create the lab's disk")?;
    file.set_len(DISK_SIZE)
        .context("cannot size the lab's disk")?;
    quiet(
        Command::new("mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-O",
                "^has_journal,^metadata_csum",
                "-m",
                "0",
                "-L",
                "lab",
                "-d",
            ])
            .arg(root)
            .arg(image),
    )
}

fn initramfs(kernel: &Kernel, work: &Path, to: &Path) -> Result<()> {
    let version = kernel_version(kernel)?;
    let modules = work.join("modules");
    let tree = kernel.dir.join("lib/modules").join(version);
    stock::collect(&tree, &["virtio_pci", "virtio_blk", "ext4"], &modules)?;
    let mut archive = Archive::default();
    for dir in ["bin", "modules", "dev"] {
        archive.dir(dir)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.copy("bin/busybox", 0o755, Path::new("/bin/busybox"))?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let list = fs::read_to_string(modules.join("modules.list")).context("no modules.list")?;
    for name in list.lines().chain(["modules.list"]) {
        archive.copy(&format!("modules/{name}"), 0o644, &modules.join(name))?;
    }
    fs::write(to, archive.finish()?).context("cannot write the lab's initramfs")
}
