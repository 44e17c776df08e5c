//! The standard library for targets other than this machine's, built from the compiler's own source.
//!
//! Debian packages the source of the compilers it has had; a toolchain with the `rust-src` component
//! brings its own. The library must be of exactly the compiler's version: rustc refuses another.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step::{quiet, step, text};
use crate::{apt, paths};

/// Counts changes of this recipe that change its result.
const RECIPE: &str = "1";

/// Where Debian keeps compilers, newest last.
const SUITES: [&str; 3] = ["bookworm-backports", "trixie-backports", "sid"];

/// A folder to name as rustc's `--sysroot`, with the standard library for `target`.
pub(crate) fn ensure(target: &str) -> Result<PathBuf> {
    let release = release()?;
    let home = paths::cache()?.join("sysroot");
    let dir = home.join(format!("{release}-{RECIPE}-{target}"));
    if dir.exists() {
        return Ok(dir);
    }
    let _lock = paths::lock(&home, target)?;
    if !dir.exists() {
        step(&format!("standard library for {target}"), || {
            build(&home, &dir, &release, target)
        })?;
    }
    Ok(dir)
}

/// The compiler's version, such as `1.95.0`.
fn release() -> Result<String> {
    let said = text(Command::new("rustc").arg("-vV"))?;
    said.lines()
        .find_map(|line| line.strip_prefix("release: "))
        .map(str::to_owned)
        .context("rustc names no release")
}

fn build(home: &Path, dir: &Path, release: &str, target: &str) -> Result<()> {
    let library = library(home, release)?;
    let work = tempfile::tempdir_in(home).context("cannot make a folder to build in")?;
    dummy(work.path())?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    quiet(
        Command::new(cargo)
            .current_dir(work.path())
            .args(["build", "--release", "--target", target])
            .arg("-Zbuild-std=std,panic_abort,panic_unwind,proc_macro,test")
            .env("CARGO_TARGET_DIR", work.path().join("target"))
            // Both are how the compiler's own build does it: the standard library is written in the
            // compiler's unstable language.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("__CARGO_TESTS_ONLY_SRC_ROOT", &library)
            // Set by `cargo run` for this program.
            .env_remove("CARGO_MANIFEST_DIR")
            .env_remove("CARGO_PKG_NAME"),
    )?;
    let fresh = work.path().join("sysroot");
    let to = fresh.join("lib/rustlib").join(target).join("lib");
    paths::make_dir(&to)?;
    let deps = work.path().join("target").join(target).join("release/deps");
    for entry in fs::read_dir(&deps).context("nothing was built")? {
        let path = entry.context("cannot list what was built")?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.ends_with(".rlib") && !name.starts_with("libdummy") {
            fs::copy(&path, to.join(&name)).with_context(|| format!("cannot copy {name}"))?;
        }
    }
    fs::rename(&fresh, dir).with_context(|| format!("cannot make {}", dir.display()))
}

/// A crate that makes cargo build the standard library with the compiler's own choices.
fn dummy(dir: &Path) -> Result<()> {
    const MANIFEST: &str = r#"cargo-features = ["profile-rustflags"]
[workspace]
[package]
name = "dummy"
version = "0.0.0"
edition = "2024"
[profile.release]
panic = "unwind"
debug = 0
rustflags = ["-Cembed-bitcode=yes"]
[profile.release.package.panic_abort]
rustflags = ["-Cpanic=abort", "-Cembed-bitcode=yes"]
"#;
    paths::make_dir(&dir.join("src"))?;
    fs::write(dir.join("Cargo.toml"), MANIFEST).context("cannot write a manifest")?;
    fs::write(dir.join("src/lib.rs"), "#![no_std]\n").context("cannot write a crate")
}

/// The `library` folder of the compiler's source.
fn library(home: &Path, release: &str) -> Result<PathBuf> {
    let sysroot = PathBuf::from(text(Command::new("rustc").args(["--print", "sysroot"]))?);
    let component = sysroot.join("lib/rustlib/src/rust/library");
    if component.exists() {
        return Ok(component);
    }
    let dir = home.join(format!("source-{release}"));
    let library = dir.join(format!("usr/src/rustc-{release}/library"));
    if library.exists() {
        return Ok(library);
    }
    let _lock = paths::lock(home, "source")?;
    if library.exists() {
        return Ok(library);
    }
    for name in SUITES {
        let suite = apt::Suite::open(name)?;
        let versions = suite.versions("rust-src")?;
        let Some(version) = versions.iter().find(|version| is_of(version, release)) else {
            continue;
        };
        let work = tempfile::tempdir_in(home).context("cannot make a folder to unpack in")?;
        for deb in suite.download(&[&format!("rust-src={version}")])? {
            apt::unpack(&deb, work.path())?;
        }
        paths::remove_dir(&dir)?;
        fs::rename(work.keep(), &dir).context("cannot place the compiler's source")?;
        return Ok(library);
    }
    bail!(
        "no suite of {SUITES:?} has rust-src {release}: `rustup component add rust-src` has it as well"
    )
}

/// Whether a package's version is of this release: `1.95.0+dfsg1-2~bpo13+1`.
fn is_of(version: &str, release: &str) -> bool {
    version
        .strip_prefix(release)
        .is_some_and(|rest| rest.starts_with(['+', '-', '~']))
}

#[cfg(test)]
mod tests {
    use super::is_of;

    #[test]
    fn a_source_of_another_release_is_told_apart() {
        assert!(is_of("1.95.0+dfsg1-2~bpo13+1", "1.95.0"));
        assert!(!is_of("1.95.01+dfsg1-2", "1.95.0"));
        assert!(!is_of("1.94.1+dfsg1-2", "1.95.0"));
    }
}
