//! Device rules of a cgroup (linux.resources.devices), as an eBPF program that the kernel asks.
//!
//! cgroup v2 has no device controller of its own. The program gets a struct bpf_cgroup_dev_ctx:
//! kind and access in one word, then the device's numbers; it answers 1 for yes.

use std::fs::File;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys::bpf;

/// BPF_DEVCG_DEV_* and BPF_DEVCG_ACC_* of linux/bpf.h.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// More rules than any configuration has; the program stays far below the kernel's limit.
const RULES_MAX: usize = 1024;

/// One rule; what is `None` matches everything.
#[derive(Debug, Clone, Copy)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

const fn allowed(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// What runc allows every container after all rules (libcontainer/specconv, AllowedDevices).
const ALWAYS: [Rule; 11] = [
    allowed(CHARACTER, None, None, MKNOD),
    allowed(BLOCK, None, None, MKNOD),
    // null, random, full, tty, zero, urandom
    allowed(CHARACTER, Some(1), Some(3), ALL),
    allowed(CHARACTER, Some(1), Some(8), ALL),
    allowed(CHARACTER, Some(1), Some(7), ALL),
    allowed(CHARACTER, Some(5), Some(0), ALL),
    allowed(CHARACTER, Some(1), Some(5), ALL),
    allowed(CHARACTER, Some(1), Some(9), ALL),
    // The terminal, /dev/pts/* and ptmx.
    allowed(CHARACTER, Some(5), Some(1), ALL),
    allowed(CHARACTER, Some(136), None, ALL),
    allowed(CHARACTER, Some(5), Some(2), ALL),
];

/// Enforces `rules`, the later ones first, on every process of the cgroup at `directory`.
///
/// # Errors
///
/// A rule makes no sense, or the kernel doesn't take the program.
pub(crate) fn enforce(rules: &[LinuxDeviceCgroup], directory: &Path) -> io::Result<()> {
    if rules.len() > RULES_MAX {
        let text = format!("{} device rules; expected at most {RULES_MAX}", rules.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut all = rules.iter().map(Rule::of).collect::<io::Result<Vec<_>>>()?;
    all.extend(ALWAYS);
    bpf::attach_device_program(&File::open(directory)?, &program(&all))
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> io::Result<Self> {
        let wrong = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("device rule \"{rule}\""),
            )
        };
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            Some(LinuxDeviceType::P) => return Err(wrong()),
        };
        // A negative number is a wildcard.
        let number = |number: Option<i64>| match number {
            None => Ok(None),
            Some(number) if number < 0 => Ok(None),
            Some(number) => i32::try_from(number).map(Some).map_err(|_| wrong()),
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or_default().chars() {
            access |= match letter {
                'm' => MKNOD,
                'r' => READ,
                'w' => WRITE,
                _ => return Err(wrong()),
            };
        }
        Ok(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access: if access == 0 { ALL } else { access },
        })
    }
}

/// An eBPF instruction as the kernel lays it out.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let offset = u16::from_ne_bytes(offset.to_ne_bytes()) as u64;
    let value = u32::from_ne_bytes(value.to_ne_bytes()) as u64;
    code as u64 | (to as u64) << 8 | (from as u64) << 12 | offset << 16 | value << 32
}

// Codes of linux/bpf.h and bpf_common.h, by what they do.
const LOAD_WORD: u8 = 0x61;
const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE: u8 = 0xbf;
const AND_IMMEDIATE: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_NOT: u8 = 0x55;
const JUMP_IF_NOT_REGISTER: u8 = 0x5d;
const JUMP_IF: u8 = 0x15;
const EXIT: u8 = 0x95;

/// Registers: the answer, the context and then the scratch, kind, access, numbers.
const R0: u8 = 0;
const R1: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// The program for `rules`: the last one that matches decides, and without one the answer is no.
fn program(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, R1, 0, 0),
        instruction(MOVE, ACCESS, KIND, 0, 0),
        instruction(AND_IMMEDIATE, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, R1, 4, 0),
        instruction(LOAD_WORD, MINOR, R1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // Each step jumps past the rule where it doesn't match; `left` counts from there.
        let mut steps: Vec<(u8, u8, u8, i32)> = Vec::new();
        if let Some(kind) = rule.kind {
            steps.push((JUMP_IF_NOT, KIND, 0, kind));
        }
        if rule.access != ALL {
            steps.push((MOVE, R1, ACCESS, 0));
            steps.push((AND_IMMEDIATE, R1, 0, rule.access));
            steps.push(if rule.allow {
                // All that is asked for must be in the rule,
                (JUMP_IF_NOT_REGISTER, R1, ACCESS, 0)
            } else {
                // and any of it is enough for a no.
                (JUMP_IF, R1, 0, 0)
            });
        }
        if let Some(major) = rule.major {
            steps.push((JUMP_IF_NOT, MAJOR, 0, major));
        }
        if let Some(minor) = rule.minor {
            steps.push((JUMP_IF_NOT, MINOR, 0, minor));
        }
        let always = steps.is_empty();
        // Behind the steps come two instructions of the answer.
        let mut left = i16::try_from(steps.len()).unwrap_or(i16::MAX) + 1;
        for (code, to, from, value) in steps {
            let jumps = matches!(code, JUMP_IF | JUMP_IF_NOT | JUMP_IF_NOT_REGISTER);
            program.push(instruction(
                code,
                to,
                from,
                if jumps { left } else { 0 },
                value,
            ));
            left -= 1;
        }
        program.push(instruction(MOVE_IMMEDIATE, R0, 0, 0, rule.allow.into()));
        program.push(instruction(EXIT, 0, 0, 0, 0));
        if always {
            // The kernel refuses programs with steps that are never reached.
            return program;
        }
    }
    program.push(instruction(MOVE_IMMEDIATE, R0, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests;
