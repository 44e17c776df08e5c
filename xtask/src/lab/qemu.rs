//! The lab's emulator: installed where it is missing, and run without a fault of its SVM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::model::Model;
use crate::apt;

/// In `helper_vmrun` of Debian's 10.0.2, where it injects an interrupt: the vector, `error_code`,
/// `exception_index`, `exception_is_int` and `exception_next_eip`.
const INJECTION: [&[u8]; 5] = [
    &[0x41, 0x0f, 0xb6, 0xf4],
    &[0x44, 0x89, 0xab, 0xe0, 0x33, 0, 0],
    &[0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff],
    &[0xc7, 0x83, 0xe4, 0x33, 0, 0, 0, 0, 0, 0],
    &[0x48, 0xc7, 0x83, 0xe8, 0x33, 0, 0, 0xff, 0xff, 0xff, 0xff],
];

/// Which of them is one too many. What it stores is used only when a kick finds it there before the
/// guest's next exit, and then delivers the interrupt a second time: the guest breaks.
const FAULT: usize = 2;

/// One instruction that does nothing, as long as that store.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];

/// The program to run a lab in `dir` with: a copy without the fault if it has it where we know it,
/// else as it is installed.
pub(super) fn program(model: &Model, dir: &Path) -> Result<PathBuf> {
    ensure(model)?;
    let installed = std::env::var_os("PATH")
        .and_then(|path| {
            let mut files = std::env::split_paths(&path).map(|folder| folder.join(model.qemu));
            files.find(|file| file.is_file())
        })
        .with_context(|| format!("{} is not on PATH", model.qemu))?;
    let code = fs::read(&installed).with_context(|| format!("cannot read {}", model.qemu))?;
    let Some(code) = mended(code) else {
        return Ok(installed);
    };
    let copy = dir.join(model.qemu);
    fs::write(&copy, code)
        .and_then(|()| fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)))
        .context("cannot make a copy of QEMU")?;
    Ok(copy)
}

/// The code without the fault, if that is in it exactly once.
fn mended(mut code: Vec<u8>) -> Option<Vec<u8>> {
    let injection = INJECTION.concat();
    let mut places = code
        .windows(injection.len())
        .enumerate()
        .filter(|(_, window)| *window == injection);
    let (Some((place, _)), None) = (places.next(), places.next()) else {
        return None;
    };
    let store = place
        + INJECTION
            .iter()
            .take(FAULT)
            .map(|part| part.len())
            .sum::<usize>();
    code.get_mut(store..)?
        .iter_mut()
        .zip(NOTHING)
        .for_each(|(byte, nothing)| *byte = nothing);
    Some(code)
}

/// QEMU 10 of backports where this release has one older; any from 7.2 on is taken as it is.
pub(super) fn ensure(model: &Model) -> Result<()> {
    let there = || {
        Command::new(model.qemu)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok()
    };
    if there() {
        return Ok(());
    }
    let package = model.qemu_package;
    let codename = apt::codename()?;
    let newer = apt::Suite::open(&format!("{codename}-backports"))
        .and_then(|suite| suite.install(&[package]));
    if let Err(error) = newer {
        eprintln!("    no QEMU from backports ({error:#}); taking the release's own");
        apt::ensure(&[package])?;
    }
    if !there() {
        bail!(
            "{} is still not there after installing {package}",
            model.qemu
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fault_goes_and_all_else_stays() {
        let code = |store: &[u8]| {
            let mut parts = INJECTION;
            parts[FAULT] = store;
            [&[0x90; 5], parts.concat().as_slice(), &[0xc3]].concat()
        };
        assert_eq!(NOTHING.len(), INJECTION[FAULT].len());
        assert_eq!(mended(code(INJECTION[FAULT])), Some(code(&NOTHING)));
        // Another build's, and what is in it twice, is left alone.
        assert_eq!(mended(code(&NOTHING)), None);
        assert_eq!(mended(code(INJECTION[FAULT]).repeat(2)), None);
    }
}
