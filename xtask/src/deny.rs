//! `xtask deny`: licences, sources and advisories of everything we link, by cargo-deny.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::paths;
use crate::step::{call, quiet, step};

/// The one the policy in deny.toml was written for.
const VERSION: &str = "0.20.2";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out advisories, whose database is fetched anew each time
    #[arg(long)]
    offline: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    check(args.offline)
}

/// Holds the dependencies against deny.toml.
pub(crate) fn check(offline: bool) -> Result<()> {
    let cargo_deny = ensure()?;
    let mut command = Command::new(cargo_deny);
    command
        .current_dir(paths::root())
        .args(["--log-level", "error", "check"]);
    if offline {
        command.args(["bans", "licenses", "sources"]);
    }
    step("licences and sources", || call(&mut command))
}

/// cargo-deny of [`VERSION`], compiled into the cache once.
fn ensure() -> Result<PathBuf> {
    let tools = paths::cache()?
        .join("tools")
        .join(format!("cargo-deny-{VERSION}"));
    let program = tools.join("bin/cargo-deny");
    if program.exists() {
        return Ok(program);
    }
    let _lock = paths::lock(&tools, "install")?;
    step("cargo-deny", || {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        quiet(
            Command::new(cargo)
                .args(["install", "cargo-deny", "--locked", "--quiet"])
                .args(["--version", VERSION, "--root"])
                .arg(&tools)
                // Set by `cargo run` for this program.
                .env_remove("CARGO_MANIFEST_DIR")
                .env_remove("CARGO_PKG_NAME"),
        )
    })?;
    Ok(program)
}
