//! Static release binaries, the initramfs, and the tree of files an installation consists of.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::kernel::{self, Kernel, stock};
use crate::step::{call, quiet, sha256_file, step};
use crate::{apt, paths, programs};

/// Built for this target by name, so that flags for it don't reach build scripts and macros.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Package and binary of what an installation has.
const BINARIES: &[(&str, &str)] = &[
    ("supermachine-shim", "containerd-shim-supermachine-v2"),
    ("supermachine-runtime", "supermachine"),
    ("supermachine-agent", "supermachine-agent"),
];

/// Where the installed files are on a machine, relative to its root.
const BIN: &str = "usr/local/bin";
const SHARE: &str = "usr/local/share/supermachine";
const CONFIG: &str = "etc/supermachine/config.toml";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// With the stock Debian kernel even if the lean one is cached
    #[arg(long)]
    stock: bool,
}

pub(crate) fn run(args: &Args) -> Result<PathBuf> {
    let kernel = if args.stock {
        stock::ensure()?
    } else {
        best_kernel()?
    };
    build(&kernel)?;
    let layout = layout()?;
    println!("{}", layout.display());
    Ok(layout)
}

/// The lean kernel where it is cached, otherwise Debian's.
pub(crate) fn best_kernel() -> Result<Kernel> {
    match kernel::cached()? {
        Some(kernel) => Ok(kernel),
        None => stock::ensure(),
    }
}

/// Builds with the best kernel at hand.
pub(crate) fn ensure() -> Result<()> {
    build(&best_kernel()?)
}

/// Builds everything into [`paths::products`].
pub(crate) fn build(kernel: &Kernel) -> Result<()> {
    apt::ensure(&["binutils", "gcc", "libseccomp-dev", "pkg-config"])?;
    step("static binaries", binaries)?;
    programs::install()?;
    step("initramfs and installation tree", || {
        let _lock = paths::lock(&paths::target(), "products")?;
        let share = paths::products().join("share");
        paths::make_dir(&share)?;
        let agent = paths::products().join("bin/supermachine-agent");
        fs::write(share.join("initramfs.cpio"), initramfs(&agent, None)?)
            .context("cannot write the initramfs")?;
        if let Ok(stock) = stock::ensure() {
            fs::write(
                share.join("initramfs-stock.cpio"),
                initramfs(&agent, Some(&stock))?,
            )
            .context("cannot write the initramfs")?;
        }
        collect_kernels(&share)?;
        arrange(kernel, &share)
    })
}

/// Where the kernels are that tests boot beside the installed one.
pub(crate) fn kernels() -> PathBuf {
    paths::products().join("kernels")
}

/// Debian's kernel with its initramfs, and ours as a bzImage, as far as they are there.
fn collect_kernels(share: &Path) -> Result<()> {
    paths::remove_dir(&kernels())?;
    paths::make_dir(&kernels())?;
    let place = |from: &Path, name: &str| {
        fs::copy(from, kernels().join(name)).with_context(|| format!("cannot copy {name}"))
    };
    if let Ok(stock) = stock::ensure() {
        place(&stock.dir.join("vmlinuz"), "vmlinuz-stock")?;
        let initramfs = "initramfs-stock.cpio";
        place(&share.join(initramfs), initramfs)?;
    }
    if let Some(lean) = kernel::cached()? {
        place(&lean.dir.join("bzImage"), "bzImage")?;
    }
    Ok(())
}

/// A cargo command for static binaries of ours.
fn cargo(subcommand: &str) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(paths::root())
        .args([subcommand, "--release", "--target", TARGET])
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-C target-feature=+crt-static",
        )
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu")
        // Set by `cargo run` for this program; they would confuse the inner cargo's caching.
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("CARGO_PKG_NAME");
    command
}

/// One cargo for all of them, the programs of the tests included: with another choice of packages
/// cargo chooses other features, and builds every dependency again.
fn binaries() -> Result<()> {
    let mut command = cargo("build");
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
    let bin = paths::products().join("bin");
    paths::make_dir(&bin)?;
    for (_, binary) in BINARIES {
        install_stripped(&built(binary), &bin)?;
    }
    Ok(())
}

/// Where cargo leaves a binary.
pub(crate) fn built(binary: &str) -> PathBuf {
    paths::target().join(TARGET).join("release").join(binary)
}

/// Strips `from` into the folder `to`, beside and renamed: it may be running there.
pub(crate) fn install_stripped(from: &Path, to: &Path) -> Result<()> {
    let name = from.file_name().context("a binary without a name")?;
    let temporary = to.join(".new");
    quiet(
        Command::new("strip")
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
pub(crate) fn layout() -> Result<PathBuf> {
    let root = paths::products().join("root");
    anyhow::ensure!(
        root.join(CONFIG).exists(),
        "nothing is built yet: run `cargo xtask build`, or use --no-install"
    );
    Ok(root)
}

/// Lays the installation out under `root/`, with the configuration that names its kernel.
fn arrange(kernel: &Kernel, share: &Path) -> Result<()> {
    let root = paths::products().join("root");
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
    for (_, binary) in BINARIES
        .iter()
        .filter(|(_, binary)| *binary != "supermachine-agent")
    {
        copy(
            &paths::products().join("bin").join(binary),
            &format!("{BIN}/{binary}"),
        )?;
    }
    let vmlinux = kernel.vmlinux();
    copy(&vmlinux, &format!("{SHARE}/vmlinux"))?;
    let initramfs = if kernel.stock {
        "initramfs-stock.cpio"
    } else {
        "initramfs.cpio"
    };
    copy(&share.join(initramfs), &format!("{SHARE}/initramfs.cpio"))?;

    let config = configuration(Path::new("/"), &sha256_file(&vmlinux)?);
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
    let root = layout()?;
    let sha256 = sha256_file(&root.join(SHARE).join("vmlinux"))?;
    Ok(format!(
        "{}\n[rootfs]\ndirectory = \"{data}/writable\"\n\n[images]\ndirectory = \"{data}/images\"\n",
        configuration(&root, &sha256),
        data = data.display(),
    ))
}
