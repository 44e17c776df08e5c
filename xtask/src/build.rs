//! Static release binaries, the initramfs, and the tree of files an installation consists of.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::kernel::{self, Kernel, stock};
use crate::step::{call, quiet, sha256_file, step};
use crate::{cross, paths, programs};

/// What containerd executes.
const SHIM: &str = "containerd-shim-supermachine-v2";
/// What the shim executes.
const VMM: &str = "supermachine-vmm";
/// The guest's first process.
const AGENT: &str = "supermachine-agent";

/// Package and binary of what is built for an installation.
const BINARIES: &[(&str, &str)] = &[
    ("supermachine-shim", SHIM),
    ("supermachine-runtime", "supermachine"),
    ("supermachine-vmm", VMM),
    ("supermachine-agent", AGENT),
];

/// Where the installed files are on a machine, relative to its root: what people and containerd look
/// for on their PATH, what the shim executes, what a guest boots.
const BIN: &str = "usr/local/bin";
const LIBEXEC: &str = "usr/local/libexec";
const SHARE: &str = "usr/local/share/supermachine";
const CONFIG: &str = "etc/supermachine/config.toml";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// With the stock Debian kernel even if the lean one is cached
    #[arg(long)]
    stock: bool,
    /// The processor it is for
    #[arg(long, value_enum, default_value_t)]
    arch: Arch,
    /// Only what runs in the guest, for a host that is built elsewhere, such as a Mac: `vmlinux` and
    /// `initramfs.cpio`
    #[arg(long)]
    guest: bool,
}

pub(crate) fn run(args: &Args) -> Result<PathBuf> {
    let kernel = if args.stock {
        stock::ensure(args.arch)?
    } else {
        best_kernel(args.arch)?
    };
    if args.guest {
        let folder = guest(&kernel)?;
        println!("{}", folder.display());
        return Ok(folder);
    }
    build(&kernel)?;
    let layout = layout(args.arch)?;
    println!("{}", layout.display());
    Ok(layout)
}

/// The lean kernel where it is cached, otherwise Debian's.
pub(crate) fn best_kernel(arch: Arch) -> Result<Kernel> {
    match kernel::cached(arch)? {
        Some(kernel) => Ok(kernel),
        None => stock::ensure(arch),
    }
}

/// Builds with the best kernel at hand.
pub(crate) fn ensure(arch: Arch) -> Result<()> {
    build(&best_kernel(arch)?)
}

/// Builds everything for the kernel's processor into [`paths::products`].
pub(crate) fn build(kernel: &Kernel) -> Result<()> {
    let arch = kernel.arch;
    step("static binaries", || binaries(arch))?;
    programs::install(arch)?;
    step("initramfs and installation tree", || {
        let _lock = paths::lock(&paths::target(), "products")?;
        let share = paths::products(arch).join("share");
        paths::make_dir(&share)?;
        let agent = paths::products(arch).join("bin/supermachine-agent");
        fs::write(share.join("initramfs.cpio"), initramfs(&agent, None)?)
            .context("cannot write the initramfs")?;
        if let Ok(stock) = stock::ensure(arch) {
            fs::write(
                share.join("initramfs-stock.cpio"),
                initramfs(&agent, Some(&stock))?,
            )
            .context("cannot write the initramfs")?;
        }
        collect_kernels(arch, &share)?;
        arrange(kernel, &share)
    })
}

/// Builds the guest's side alone: a folder with its kernel and initramfs.
pub(crate) fn guest(kernel: &Kernel) -> Result<PathBuf> {
    let arch = kernel.arch;
    step("agent", || {
        let mut command = cross::cargo("build", arch)?;
        call(command.args(["-p", "supermachine-agent", "--bin", AGENT]))
    })?;
    let folder = paths::products(arch).join("guest");
    paths::make_dir(&folder)?;
    install_stripped(&built(arch, AGENT), &folder, arch)?;
    let agent = folder.join(AGENT);
    let archive = initramfs(&agent, kernel.stock.then_some(kernel))?;
    fs::write(folder.join("initramfs.cpio"), archive).context("cannot write the initramfs")?;
    fs::remove_file(&agent).context("cannot remove the agent beside its initramfs")?;
    fs::copy(kernel.image(), folder.join("vmlinux")).context("cannot copy the kernel")?;
    eprintln!("    guest kernel: {}", kernel.name());
    Ok(folder)
}

/// Where the kernels are that tests boot beside the installed one.
pub(crate) fn kernels(arch: Arch) -> PathBuf {
    paths::products(arch).join("kernels")
}

/// Debian's kernel with its initramfs, and ours as a bzImage, as far as they are there.
fn collect_kernels(arch: Arch, share: &Path) -> Result<()> {
    let folder = kernels(arch);
    paths::remove_dir(&folder)?;
    paths::make_dir(&folder)?;
    let place = |from: &Path, name: &str| {
        fs::copy(from, folder.join(name)).with_context(|| format!("cannot copy {name}"))
    };
    if let Ok(stock) = stock::ensure(arch) {
        place(&stock.dir.join("vmlinuz"), "vmlinuz-stock")?;
        let initramfs = "initramfs-stock.cpio";
        place(&share.join(initramfs), initramfs)?;
    }
    if arch == Arch::X86_64
        && let Some(lean) = kernel::cached(arch)?
    {
        place(&lean.dir.join("bzImage"), "bzImage")?;
    }
    Ok(())
}

/// One cargo for all of them, the programs of the tests included: with another choice of packages
/// cargo chooses other features, and builds every dependency again.
fn binaries(arch: Arch) -> Result<()> {
    let mut command = cross::cargo("build", arch)?;
    command.args(["-p", programs::PACKAGE]);
    for program in programs::PROGRAMS {
        command.args(["--bin", program]);
    }
    for (package, binary) in BINARIES {
        command.args(["-p", package, "--bin", binary]);
    }
    command.args(["-p", programs::EXAMPLES_OF]);
    for example in programs::EXAMPLES {
        command.args(["--example", example]);
    }
    call(&mut command)?;
    let bin = paths::products(arch).join("bin");
    paths::make_dir(&bin)?;
    for (_, binary) in BINARIES {
        install_stripped(&built(arch, binary), &bin, arch)?;
    }
    Ok(())
}

/// Where cargo leaves a binary.
pub(crate) fn built(arch: Arch, binary: &str) -> PathBuf {
    paths::target()
        .join(arch.target())
        .join("release")
        .join(binary)
}

/// Strips `from` into the folder `to`, beside and renamed: it may be running there.
pub(crate) fn install_stripped(from: &Path, to: &Path, arch: Arch) -> Result<()> {
    let name = from.file_name().context("a binary without a name")?;
    let temporary = to.join(".new");
    quiet(
        Command::new(arch.tool("strip"))
            .arg("-s")
            .arg(from)
            .arg("-o")
            .arg(&temporary),
    )?;
    fs::rename(&temporary, to.join(name)).with_context(|| format!("cannot place {}", to.display()))
}

/// The guest's initramfs: the agent as /init and, for a stock kernel, its modules with
/// `modules.list` in load order.
fn initramfs(agent: &Path, stock: Option<&Kernel>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "run", "tmp"] {
        archive.dir(dir)?;
    }
    // The kernel opens it for init's standard streams before devtmpfs is there.
    archive.character_device("dev/console", 5, 1)?;
    archive.copy("init", 0o755, agent)?;
    if let Some(stock) = stock {
        let modules = stock.dir.join("modules");
        for dir in ["lib", "lib/supermachine", "lib/supermachine/modules"] {
            archive.dir(dir)?;
        }
        let list = fs::read_to_string(modules.join("modules.list")).context("no modules.list")?;
        for name in list.lines().chain(["modules.list"]) {
            let to = format!("lib/supermachine/modules/{name}");
            archive.copy(&to, 0o644, &modules.join(name))?;
        }
    }
    archive.finish()
}

/// The tree of files an installation consists of, as [`build`] left it.
pub(crate) fn layout(arch: Arch) -> Result<PathBuf> {
    let root = paths::products(arch).join("root");
    anyhow::ensure!(
        root.join(CONFIG).exists(),
        "nothing is built yet: run `cargo xtask build`, or use --no-install"
    );
    Ok(root)
}

/// What of it is the guest's: a folder as [`guest`] makes one.
pub(crate) fn installed_guest(arch: Arch) -> Result<PathBuf> {
    Ok(layout(arch)?.join(SHARE))
}

/// Lays the installation out under `root/`, with the configuration that names its kernel.
fn arrange(kernel: &Kernel, share: &Path) -> Result<()> {
    let products = paths::products(kernel.arch);
    let root = products.join("root");
    paths::remove_dir(&root)?;
    let copy = |from: &Path, to: &str| -> Result<()> {
        let to = root.join(to);
        paths::make_dir(to.parent().context("a file without a folder")?)?;
        // The cache is often on the same file system.
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        }
        Ok(())
    };
    for (_, binary) in BINARIES {
        let folder = match *binary {
            AGENT => continue,
            VMM => LIBEXEC,
            _ => BIN,
        };
        let built = products.join("bin").join(binary);
        copy(&built, &format!("{folder}/{binary}"))?;
    }
    let image = kernel.image();
    copy(&image, &format!("{SHARE}/vmlinux"))?;
    let initramfs = if kernel.stock {
        "initramfs-stock.cpio"
    } else {
        "initramfs.cpio"
    };
    copy(&share.join(initramfs), &format!("{SHARE}/initramfs.cpio"))?;

    let config = configuration(Path::new("/"), &sha256_file(&image)?);
    let path = root.join(CONFIG);
    paths::make_dir(path.parent().context("a file without a folder")?)?;
    fs::write(&path, config).context("cannot write the configuration")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
        .context("cannot set the configuration's mode")?;
    eprintln!("    guest kernel: {}", kernel.name());
    Ok(())
}

/// The configuration file of an installation below `root`.
fn configuration(root: &Path, sha256: &str) -> String {
    let share = root.join(SHARE);
    format!(
        "# Written by `cargo xtask build`.\n[kernel]\npath = \"{}\"\nsha256 = \"{sha256}\"\ninitramfs = \"{}\"\n",
        share.join("vmlinux").display(),
        share.join("initramfs.cpio").display(),
    )
}

/// A configuration for running what was built from where it is, with its data below `data`.
pub(crate) fn native_configuration(data: &Path) -> Result<String> {
    let root = layout(Arch::HOST)?;
    let sha256 = sha256_file(&root.join(SHARE).join("vmlinux"))?;
    Ok(format!(
        "{}\n[vm]\nprogram = \"{}\"\n\n[rootfs]\ndirectory = \"{data}/writable\"\n\n[images]\ndirectory = \"{data}/images\"\n",
        configuration(&root, &sha256),
        root.join(LIBEXEC).join(VMM).display(),
        data = data.display(),
    ))
}
