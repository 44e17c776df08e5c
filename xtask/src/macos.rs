//! The macOS build, checked on Linux: lints of everything that goes there, tests included, and its
//! programs linked as Mach-O.
//!
//! Nothing of Apple's is needed. The standard library is built from the compiler's source
//! ([`sysroot`]), and the linker is told by stubs of our own which symbols the system's libraries
//! have. A stub names what is used and nothing else: code that calls something new fails to link
//! until the name is added to its list, after a look whether macOS has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::{call, step};
use crate::{paths, sysroot};

const TARGET: &str = "aarch64-apple-darwin";

/// The oldest macOS with an interrupt controller in its hypervisor.
const DEPLOYMENT_TARGET: &str = "15.0";

/// What runs on a Mac. The agent runs in the guest, which is Linux; the rest is for tests.
const PACKAGES: [&str; 4] = [
    "supermachine-vmm",
    "supermachine-protocol",
    "supermachine-runtime",
    "supermachine-shim",
];

/// The programs that are linked, each with its package.
const PROGRAMS: [(&str, &str); 3] = [
    ("supermachine-shim", "containerd-shim-supermachine-v2"),
    ("supermachine-runtime", "supermachine"),
    ("supermachine-vmm", "supermachine-vmm"),
];

/// The system's libraries as the linker sees them: where each is in an SDK, how programs name it,
/// and what it has.
const LIBRARIES: [Library; 3] = [
    Library {
        stub: "usr/lib/libSystem.tbd",
        name: "/usr/lib/libSystem.B.dylib",
        symbols: include_str!("macos/libSystem.txt"),
    },
    Library {
        stub: "usr/lib/libiconv.tbd",
        name: "/usr/lib/libiconv.2.dylib",
        symbols: "iconv\niconv_close\niconv_open\n",
    },
    Library {
        stub: "System/Library/Frameworks/Hypervisor.framework/Hypervisor.tbd",
        name: "/System/Library/Frameworks/Hypervisor.framework/Versions/A/Hypervisor",
        symbols: include_str!("macos/Hypervisor.txt"),
    },
];

/// Names under which programs ask for libSystem as well.
const ALIASES: [&str; 4] = ["libc", "libm", "libpthread", "libdl"];

struct Library {
    stub: &'static str,
    name: &'static str,
    symbols: &'static str,
}

impl Library {
    /// The stub, in the linker's own format (tapi-tbd, version 4).
    fn text(&self) -> String {
        let symbols: Vec<_> = self
            .symbols
            .lines()
            .map(|name| format!("_{name}"))
            .collect();
        format!(
            "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{}'\n\
             exports:\n  - targets: [ arm64-macos ]\n    symbols: [ {} ]\n...\n",
            self.name,
            symbols.join(", ")
        )
    }
}

/// Checks everything.
pub(crate) fn check() -> Result<()> {
    let cache = paths::cache()?.join("macos");
    let sdk = sdk(&cache)?;
    let sysroot = sysroot::ensure(TARGET)?;
    // The library is as old as its recipe, of which cargo knows nothing: a folder for each.
    let target = cache.join("target").join(
        sysroot
            .file_name()
            .context("the standard library has no place")?,
    );
    // The same flags for all: with others cargo would build every dependency again.
    let flags = format!("--sysroot {} -Clinker-flavor=ld64.lld", sysroot.display());
    let cargo = |subcommand: &str| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command
            .current_dir(paths::root())
            .args([subcommand, "--target", TARGET])
            .env("CARGO_TARGET_DIR", &target)
            .env("CARGO_TARGET_AARCH64_APPLE_DARWIN_RUSTFLAGS", &flags)
            .env("CARGO_TARGET_AARCH64_APPLE_DARWIN_LINKER", "rust-lld")
            .env("MACOSX_DEPLOYMENT_TARGET", DEPLOYMENT_TARGET)
            .env("SDKROOT", &sdk)
            // Set by `cargo run` for this program.
            .env_remove("CARGO_MANIFEST_DIR")
            .env_remove("CARGO_PKG_NAME");
        command
    };
    step("macOS: lints, tests included", || {
        let mut command = cargo("clippy");
        for package in PACKAGES {
            command.args(["-p", package]);
        }
        call(command.args(["--all-targets", "--", "-D", "warnings"]))
    })?;
    step("macOS: programs as Mach-O", || {
        let mut command = cargo("build");
        for (package, program) in PROGRAMS {
            command.args(["-p", package, "--bin", program]);
        }
        call(&mut command)?;
        PROGRAMS
            .iter()
            .try_for_each(|(_, name)| is_mach_o(&target.join(TARGET).join("debug").join(name)))
    })
}

/// A folder that the linker takes for Apple's SDK.
fn sdk(cache: &Path) -> Result<PathBuf> {
    let sdk = cache.join("sdk");
    for library in &LIBRARIES {
        let stub = sdk.join(library.stub);
        paths::make_dir(stub.parent().context("a stub without a folder")?)?;
        let text = library.text();
        // A newer file would have everything linked again.
        if fs::read_to_string(&stub).is_ok_and(|there| there == text) {
            continue;
        }
        fs::write(&stub, text).with_context(|| format!("cannot write {}", stub.display()))?;
    }
    for alias in ALIASES {
        let link = sdk.join("usr/lib").join(format!("{alias}.tbd"));
        paths::point(&link, "libSystem.tbd")?;
    }
    Ok(sdk)
}

/// Whether a file is a program for arm64 Macs: its magic and its processor.
fn is_mach_o(path: &Path) -> Result<()> {
    let program = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let expected = [0xcf, 0xfa, 0xed, 0xfe, 0x0c, 0x00, 0x00, 0x01];
    anyhow::ensure!(
        program.starts_with(&expected),
        "{} is no Mach-O program for arm64",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::LIBRARIES;

    #[test]
    fn lists_of_symbols_are_sorted_names() {
        for library in LIBRARIES {
            let names: Vec<_> = library.symbols.lines().collect();
            assert!(names.is_sorted_by(|a, b| a < b), "{}", library.stub);
            let odd = |name: &&str| name.is_empty() || name.contains([' ', ',', ']']);
            assert!(!names.iter().any(odd), "{}", library.stub);
        }
    }
}
