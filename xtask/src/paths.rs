//! Where things live: the checkout, its target folder, and the cache shared by all checkouts.

use std::env;
use std::fs;
use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::arch::Arch;

/// The root of the checkout this xtask was built from.
pub(crate) fn root() -> PathBuf {
    // Cargo sets it at run time under `cargo xtask`; the build-time value serves a bare binary.
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// What `xtask build` leaves for installation: `bin/` and `share/`.
pub(crate) fn products(arch: Arch) -> PathBuf {
    target().join(arch.suffixed("supermachine"))
}

/// `$XDG_CACHE_HOME/supermachine`, or `~/.cache/supermachine`.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
                .join(".cache")
        }
    };
    let cache = base.join("supermachine");
    make_dir(&cache)?;
    Ok(cache)
}

/// `create_dir_all` with the path in the error.
pub(crate) fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

/// Removes a folder that may not be there.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Points the symbolic link `link` at `to`, atomically.
pub(crate) fn point(link: &Path, to: &str) -> Result<()> {
    let temporary = link.with_extension(format!("new{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    symlink(to, &temporary)
        .and_then(|()| fs::rename(&temporary, link))
        .with_context(|| format!("cannot point {} at {to}", link.display()))
}

/// Holds `<dir>/<name>.lock` exclusively until dropped: one maker of a cache entry at a time.
pub(crate) fn lock(dir: &Path, name: &str) -> Result<Flock<File>> {
    make_dir(dir)?;
    let path = dir.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, nix::errno::Errno::EAGAIN)) => {
            eprintln!(
                "    waiting for another xtask that holds {}",
                path.display()
            );
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
