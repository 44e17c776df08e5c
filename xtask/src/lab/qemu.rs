//! The lab's emulator: installed where it is missing, and run without a fault of its SVM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::model::Model;
use crate::apt;

/// A fault of Debian's 10.0.2, by the code that it is in.
struct Fault {
    /// Occurs once.
    code: &'static [&'static [u8]],
    /// Which part of it is wrong.
    part: usize,
    /// What is to stand there, as long as it.
    instead: &'static [u8],
}

/// All are in `helper_vmrun`.
const FAULTS: [Fault; 2] = [
    // Where it injects an interrupt: the vector, `error_code`, `exception_index`,
    // `exception_is_int` and `exception_next_eip`. The third is one too many: it is used only when a
    // kick finds it there before the guest's next exit, and then delivers the interrupt a second
    // time: the guest breaks. Instead, one instruction that does nothing.
    Fault {
        code: &[
            &[0x41, 0x0f, 0xb6, 0xf4],
            &[0x44, 0x89, 0xab, 0xe0, 0x33, 0, 0],
            &[0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff],
            &[0xc7, 0x83, 0xe4, 0x33, 0, 0, 0, 0, 0, 0],
            &[0x48, 0xc7, 0x83, 0xe8, 0x33, 0, 0, 0xff, 0xff, 0xff, 0xff],
        ],
        part: 2,
        instead: &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
    },
    // `interrupt_request |= CPU_INTERRUPT_VIRQ` if there is a virtual interrupt: others set bits of
    // it at the same time (those of devices, timers, the other processor), and one of them may be
    // lost: a processor of the lab sleeps on. Instead, the same byte set with a lock.
    Fault {
        code: &[
            &[0x85, 0xf6, 0x74, 0x0a],
            &[0x81, 0x8b, 0x10, 0xd5, 0xff, 0xff, 0, 1, 0, 0],
            &[0xf6, 0x83, 0xb2, 0, 0, 0, 0x20],
        ],
        part: 1,
        instead: &[0xf0, 0x80, 0x8b, 0x11, 0xd5, 0xff, 0xff, 1, 0x66, 0x90],
    },
];

impl Fault {
    /// Where its wrong part is, if the code is there exactly once.
    fn find(&self, program: &[u8]) -> Option<usize> {
        let code = self.code.concat();
        let mut places = program
            .windows(code.len())
            .enumerate()
            .filter(|(_, window)| *window == code);
        let (Some((place, _)), None) = (places.next(), places.next()) else {
            return None;
        };
        let before = self.code.iter().take(self.part);
        Some(place + before.map(|part| part.len()).sum::<usize>())
    }
}

/// What a lab is run with.
pub(super) struct Program {
    pub(super) path: PathBuf,
    /// Whether it had faults, and has them no more.
    pub(super) mended: bool,
}

/// The program to run a lab in `dir` with: a copy without the faults if it has them where we
/// know them, else as it is installed.
pub(super) fn program(model: &Model, dir: &Path) -> Result<Program> {
    ensure(model)?;
    let installed = std::env::var_os("PATH")
        .and_then(|path| {
            let mut files = std::env::split_paths(&path).map(|folder| folder.join(model.qemu));
            files.find(|file| file.is_file())
        })
        .with_context(|| format!("{} is not on PATH", model.qemu))?;
    let code = fs::read(&installed).with_context(|| format!("cannot read {}", model.qemu))?;
    let Some(code) = mended(code) else {
        return Ok(Program {
            path: installed,
            mended: false,
        });
    };
    let copy = dir.join(model.qemu);
    fs::write(&copy, code)
        .and_then(|()| fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)))
        .context("cannot make a copy of QEMU")?;
    Ok(Program {
        path: copy,
        mended: true,
    })
}

/// The program without the faults, if it has all of them.
fn mended(mut program: Vec<u8>) -> Option<Vec<u8>> {
    for fault in &FAULTS {
        let place = fault.find(&program)?;
        program
            .get_mut(place..)?
            .iter_mut()
            .zip(fault.instead)
            .for_each(|(byte, instead)| *byte = *instead);
    }
    Some(program)
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

    /// A program with the code of every fault, its wrong parts as `part` tells.
    fn program(part: impl Fn(&Fault) -> &'static [u8]) -> Vec<u8> {
        let mut program = vec![0x90; 5];
        for fault in &FAULTS {
            let mut code = fault.code.to_vec();
            code[fault.part] = part(fault);
            program.extend(code.concat());
        }
        program.push(0xc3);
        program
    }

    #[test]
    fn the_faults_go_and_all_else_stays() {
        let faulty = program(|fault| fault.code[fault.part]);
        let right = program(|fault| fault.instead);
        assert_eq!(faulty.len(), right.len());
        assert_eq!(mended(faulty.clone()).as_ref(), Some(&right));
        // Another build's, and what is in it twice, is left alone.
        assert_eq!(mended(right), None);
        assert_eq!(mended(faulty.repeat(2)), None);
    }
}
