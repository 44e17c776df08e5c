//! Static programs of ours for a processor: cargo with the right linker, libraries and flags.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::step::{call, step};
use crate::{apt, paths, sysroot};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The processor
    #[arg(long, value_enum, default_value_t = Arch::Aarch64)]
    arch: Arch,
    /// What cargo is to do
    subcommand: String,
    /// More for cargo, which gets `--release` and `--target` as well
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    call(cargo(&args.subcommand, args.arch)?.args(&args.args))
}

/// A cargo command for static release binaries; what it needs is installed or fetched now.
pub(crate) fn cargo(subcommand: &str, arch: Arch) -> Result<Command> {
    apt::ensure(arch.compiler_packages())?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    let variable = arch.target().to_uppercase().replace('-', "_");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    if arch.is_foreign() {
        let sysroot = sysroot::ensure(arch.target())?;
        flags.push(format!("--sysroot={}", sysroot.display()));
        command.env(format!("CARGO_TARGET_{variable}_LINKER"), arch.tool("gcc"));
    }
    command
        .current_dir(paths::root())
        .args([subcommand, "--release", "--target", arch.target()])
        .env(
            format!("CARGO_TARGET_{variable}_RUSTFLAGS"),
            flags.join(" "),
        )
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", libraries(arch)?)
        // Set by `cargo run` for this program; they would confuse the inner cargo's caching.
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("CARGO_PKG_NAME");
    Ok(command)
}

/// The folder with libseccomp.a.
fn libraries(arch: Arch) -> Result<PathBuf> {
    let below = format!("usr/lib/{}", arch.gnu());
    if !arch.is_foreign() {
        return Ok(PathBuf::from("/").join(below));
    }
    let home = paths::cache()?.join("libraries");
    let dir = home.join(format!("{}-{}", apt::codename()?, arch.debian()));
    let libraries = dir.join(&below);
    if libraries.exists() {
        return Ok(libraries);
    }
    let _lock = paths::lock(&home, arch.debian())?;
    if !libraries.exists() {
        step(&format!("libraries for {}", arch.name()), || {
            let work = tempfile::tempdir_in(&home).context("cannot make a folder to unpack in")?;
            for deb in apt::Suite::of_release(arch)?.download(&["libseccomp-dev"])? {
                apt::unpack(&deb, work.path())?;
            }
            paths::remove_dir(&dir)?;
            std::fs::rename(work.keep(), &dir).context("cannot place the libraries")
        })?;
    }
    Ok(libraries)
}
