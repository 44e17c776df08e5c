//! The lab's root disk and initramfs, built from packages and cached by the hash of their recipe.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::files;
use super::model::Model;
use crate::arch::Arch;
use crate::containerd::{self, Containerd, Version};
use crate::kernel::{Kernel, stock};
use crate::step::{hash, quiet, step};
use crate::{apt, images, paths};

/// Counts changes of this recipe that change its result.
const RECIPE: &str = "3";

/// The suite of the root disk: its erofs-utils makes images from folders and tar streams well.
const SUITE: &str = "trixie";

/// What every lab holds beside containerd, in two parts around what one kind alone has.
const PACKAGES: [&str; 2] = [
    "base-files bash bsdutils busybox-static coreutils dash diffutils e2fsprogs erofs-utils \
    findutils gawk grep gzip hostname iproute2 iptables kmod libc-bin libseccomp2 libsystemd0 \
    login lsof mount nftables procps psmisc",
    "sed socat strace tar util-linux xz-utils zstd",
];

/// What is as new as the newest containerd; trixie's libraries are all that these need.
const NEWER_SUITE: &str = "sid";

/// The disk's size, sparse: room for images and snapshots.
const DISK_SIZE: u64 = 16 << 30;

/// The parts of a lab that all runs share.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) disk: PathBuf,
    /// The initramfs without what each run appends.
    pub(super) initramfs: PathBuf,
}

/// The lab's image, built now if the cache doesn't hold it.
pub(super) fn ensure(model: &Model) -> Result<Image> {
    let kernel = stock::ensure(model.arch)?;
    let home = paths::cache()?.join("lab");
    let dir = home.join(key(model, &kernel)?);
    if !dir.join("root.img").exists() {
        let _lock = paths::lock(&home, &model.arch.suffixed("build"))?;
        if !dir.join("root.img").exists() {
            step("lab image", || build(model, &home, &dir, &kernel))?;
        }
    }
    Ok(Image {
        kernel: kernel.image(),
        disk: dir.join("root.img"),
        initramfs: dir.join("initramfs.cpio"),
    })
}

fn package_names(model: &Model) -> String {
    let [first, last] = PACKAGES;
    let parts = [first, model.packages, last];
    parts
        .map(|part| part.split_whitespace().collect::<Vec<_>>())
        .concat()
        .join(" ")
}

fn key(model: &Model, kernel: &Kernel) -> Result<String> {
    let version = kernel_version(kernel)?;
    let (packages, newer) = (package_names(model), model.newer.join(" "));
    let parts = [RECIPE, SUITE, &packages, NEWER_SUITE, &newer, &version].map(str::as_bytes);
    Ok(hash(&parts).chars().take(16).collect())
}

fn kernel_version(kernel: &Kernel) -> Result<String> {
    let version = fs::read_to_string(kernel.dir.join("version")).context("kernel version")?;
    Ok(version.trim().to_owned())
}

/// The kernel's own tree of modules.
fn modules(kernel: &Kernel) -> Result<PathBuf> {
    Ok(kernel.dir.join("lib/modules").join(kernel_version(kernel)?))
}

fn build(model: &Model, home: &Path, dir: &Path, kernel: &Kernel) -> Result<()> {
    apt::ensure(&["mmdebstrap", "busybox-static", "e2fsprogs", "kmod"])?;
    let work = tempfile::tempdir_in(home).context("cannot make a folder in the lab's cache")?;
    let root = work.path().join("root");
    let fresh = work.path().join("image");
    paths::make_dir(&fresh)?;

    step("lab packages", || packages(model, &root))?;
    let newer = work.path().join("newer");
    for deb in apt::Suite::open_for(NEWER_SUITE, model.arch)?.download(model.newer)? {
        apt::unpack(&deb, &newer)?;
    }
    // Through the same merged /usr as the rest.
    copy(&newer.join("usr/."), &root.join("usr"))?;
    for version in Version::ALL {
        let bin = root.join(super::binaries(version).trim_start_matches('/'));
        paths::make_dir(&bin)?;
        copy(&containerd::binaries(version, model.arch)?.join("."), &bin)?;
    }
    furnish(&root, kernel)?;
    // A containerd unpacks images for its own processor.
    let preloaded = if model.arch.is_foreign() {
        &[][..]
    } else {
        &Version::ALL
    };
    for version in preloaded.iter().copied() {
        let name = format!("lab images for containerd {}", version.name());
        if let Err(error) = step(&name, || preload(version, &root, work.path())) {
            eprintln!("    runs import the images themselves ({error:#})");
        }
    }
    step("lab root disk", || disk(&root, &fresh.join("root.img")))?;
    files::base_initramfs(
        &modules(kernel)?,
        &root.join("usr/bin/busybox"),
        work.path(),
        &fresh.join("initramfs.cpio"),
    )?;

    paths::remove_dir(dir)?;
    fs::rename(&fresh, dir).with_context(|| format!("cannot make {}", dir.display()))
}

/// Packages and their dependencies, extracted and not configured: nothing of Debian runs at
/// start, so no maintainer script has to.
fn packages(model: &Model, root: &Path) -> Result<()> {
    let suite = apt::Suite::open_for(SUITE, model.arch)?;
    let mut child = Command::new("mmdebstrap")
        .args(["--variant=extract", "--mode=root", "--quiet"])
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .args([
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
        ])
        .arg(format!("--architectures={}", model.arch.debian()))
        .arg(format!(
            "--include={}",
            package_names(model).replace(' ', ",")
        ))
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

fn copy(from: &Path, to: &Path) -> Result<()> {
    quiet(Command::new("cp").arg("-a").arg(from).arg(to))
}

/// Imports the images by a containerd on this host: in the lab it takes a minute.
fn preload(version: Version, root: &Path, work: &Path) -> Result<()> {
    let archives = images::ensure(Arch::HOST)?;
    let containerd = Containerd::start(
        version,
        &root.join(super::data(version).trim_start_matches('/')),
        &work.join("state"),
        &[],
        &[],
    )?;
    containerd.import(&archives)
}

/// Kernel modules and what the maintainer scripts would have made.
fn furnish(root: &Path, kernel: &Kernel) -> Result<()> {
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
    let to = root.join("usr/lib/modules");
    paths::make_dir(&to)?;
    copy(&modules(kernel)?, &to)
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
