//! A container's system call filter, made once and installed by each of its processes.
//!
//! libcontainer would install none for exec'd processes, and none at all for those that keep the
//! right to gain privileges by a program once they have dropped theirs. So the filter is ours, made
//! by libseccomp as runc makes it, with what runc adds: calls newer than every one that the profile
//! names fail with ENOSYS, which programs understand as "try an older one".

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::Path;

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::libc;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};

use crate::sys::privilege;

/// The kernel's limit, BPF_MAXINSNS.
const INSTRUCTIONS_MAX: usize = 4096;
/// Bytes of a struct sock_filter.
const INSTRUCTION: usize = 8;
/// Set in the number of a call by the x32 ABI.
const X32: u32 = 0x4000_0000;

/// A filter that a process can install on itself.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    flags: u32,
    program: Vec<libc::sock_filter>,
}

impl Filter {
    /// Installs it on this process.
    pub(crate) fn install(&self) -> io::Result<()> {
        privilege::filter_calls(&self.program, self.flags)
    }

    /// Writes it to a file: flags, then the instructions.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut bytes = self.flags.to_ne_bytes().to_vec();
        for step in &self.program {
            bytes.extend(step.code.to_ne_bytes());
            bytes.extend([step.jt, step.jf]);
            bytes.extend(step.k.to_ne_bytes());
        }
        fs::write(path, bytes)
    }

    /// Reads what [`write`](Self::write) wrote, if it wrote anything.
    pub(crate) fn read(path: &Path) -> io::Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let (flags, program) = bytes
            .split_first_chunk()
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Some(Self {
            flags: u32::from_ne_bytes(*flags),
            program: instructions(program)?,
        }))
    }

    /// Makes the filter of a profile; the error is a sentence for users.
    pub(crate) fn of(profile: &LinuxSeccomp) -> Result<Self, String> {
        let context = context(profile)?;
        let compiled = compiled(&context)
            .map_err(|error| format!("error loading seccomp filter into kernel: {error}"))?;
        let mut program = newer_calls(profile);
        program.extend(compiled);
        if program.len() > INSTRUCTIONS_MAX {
            return Err(format!(
                "seccomp filter has {} instructions; the kernel takes {INSTRUCTIONS_MAX}",
                program.len()
            ));
        }
        Ok(Self {
            flags: flags(profile),
            program,
        })
    }
}

/// SECCOMP_FILTER_FLAG_* as seccomp(2) takes them.
fn flags(profile: &LinuxSeccomp) -> u32 {
    // Not even an empty list: what runc chooses then.
    let Some(flags) = profile.flags() else {
        return 1 << 2;
    };
    flags.iter().fold(0, |all, flag| {
        all | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 1 << 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 1 << 5,
        }
    })
}

fn context(profile: &LinuxSeccomp) -> Result<ScmpFilterContext, String> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let failed = |what: String| {
        move |error: SeccompError| format!("error adding {what} to seccomp filter: {error}")
    };
    let mut context =
        ScmpFilterContext::new(default).map_err(failed("the default action".to_owned()))?;
    for &named in profile.architectures().iter().flatten() {
        context
            .add_arch(architecture(named))
            .map_err(failed(format!("architecture {named:?}")))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            // libseccomp refuses it, as it changes nothing.
            continue;
        }
        for name in rule.names() {
            // Unknown ones are of other architectures, or newer than the library.
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            let what = || failed(format!("syscall {name}"));
            let arguments = rule.args().as_deref().unwrap_or_default();
            let compared: Vec<_> = arguments.iter().map(comparison).collect();
            let indices: std::collections::HashSet<_> =
                arguments.iter().map(LinuxSeccompArg::index).collect();
            if indices.len() == compared.len() {
                context
                    .add_rule_conditional(action, call, &compared)
                    .map_err(what())?;
                continue;
            }
            // An argument compared twice means either, as runc reads it.
            for one in compared {
                context
                    .add_rule_conditional(action, call, &[one])
                    .map_err(what())?;
            }
        }
    }
    Ok(context)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, String> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let wrong = |_| format!("seccomp errnoRet {errno} is no error's number");
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.try_into().map_err(wrong)?),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno.try_into().map_err(wrong)?),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err("seccomp action SCMP_ACT_NOTIFY needs a listener".to_owned());
        }
    })
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let (first, second) = (argument.value(), argument.value_two().unwrap_or(0));
    let (operator, datum) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, first),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, first),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, first),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, first),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, first),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, first),
        // The mask is the first value.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(first), second),
    };
    ScmpArgCompare::new(
        argument.index().try_into().unwrap_or(u32::MAX),
        operator,
        datum,
    )
}

fn architecture(named: Arch) -> ScmpArch {
    match named {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// libseccomp's program for the kernel.
fn compiled(context: &ScmpFilterContext) -> io::Result<Vec<libc::sock_filter>> {
    let memory = nix::sys::memfd::memfd_create("seccomp", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    context.export_bpf(&memory).map_err(io::Error::other)?;
    let mut memory = File::from(memory);
    memory.rewind()?;
    let mut bytes = Vec::new();
    memory.read_to_end(&mut bytes)?;
    instructions(&bytes)
}

fn instructions(bytes: &[u8]) -> io::Result<Vec<libc::sock_filter>> {
    let (steps, rest) = bytes.as_chunks::<INSTRUCTION>();
    if !rest.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let step = |[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; INSTRUCTION]| libc::sock_filter {
        code: u16::from_ne_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_ne_bytes([*k0, *k1, *k2, *k3]),
    };
    Ok(steps.iter().map(step).collect())
}

// Classic BPF (linux/bpf_common.h) on a struct seccomp_data: the call's number, then the
// architecture.
const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// What runs before the filter: ENOSYS for numbers above all that the profile names. (runc does the
/// same in libcontainer/seccomp/patchbpf.)
fn newer_calls(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    let permissive = matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog
    );
    let named = |arch: Arch| {
        profile
            .architectures()
            .iter()
            .flatten()
            .any(|one| *one == arch)
    };
    if permissive {
        return Vec::new();
    }
    let newest = |arch: ScmpArch| {
        let names = profile
            .syscalls()
            .iter()
            .flatten()
            .flat_map(|rule| rule.names());
        names
            .filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok())
            .filter_map(|call| u32::try_from(call.as_raw_syscall()).ok())
            .max()
    };
    let refuse = 0x0005_0000 | libc::ENOSYS.unsigned_abs();
    let mut stub = vec![step(LOAD, 0, 0, ARCHITECTURE)];
    // AUDIT_ARCH_X86_64; x32 shares it.
    if cfg!(target_arch = "x86_64")
        && let Some(newest_64) = newest(ScmpArch::X8664)
    {
        let newest_x32 = named(Arch::ScmpArchX32)
            .then(|| newest(ScmpArch::X32))
            .flatten();
        // Every section ends by jumping over the next, should there be one.
        stub.extend([
            step(JUMP_EQUAL, 0, 5, 0xc000_003e),
            step(LOAD, 0, 0, NUMBER),
            step(JUMP_GREATER_EQUAL, 1, 0, X32),
            step(JUMP_GREATER, 1, 2, newest_64),
            // The filter itself refuses x32 where it isn't asked for.
            step(
                JUMP_GREATER,
                0,
                1,
                newest_x32.map_or(u32::MAX, |newest| newest | X32),
            ),
            step(RETURN, 0, 0, refuse),
        ]);
    }
    // One whose numbers no other shares: as the audit subsystem numbers it, and whether it counts
    // without being named.
    let (name, library, number, always) = if cfg!(target_arch = "aarch64") {
        // AUDIT_ARCH_AARCH64
        (Arch::ScmpArchAarch64, ScmpArch::Aarch64, 0xc000_00b7, true)
    } else {
        // AUDIT_ARCH_I386
        (Arch::ScmpArchX86, ScmpArch::X86, 0x4000_0003, false)
    };
    if let Some(newest) = newest(library).filter(|_| always || named(name)) {
        stub.extend([
            step(LOAD, 0, 0, ARCHITECTURE),
            step(JUMP_EQUAL, 0, 3, number),
            step(LOAD, 0, 0, NUMBER),
            step(JUMP_GREATER, 0, 1, newest),
            step(RETURN, 0, 0, refuse),
        ]);
    }
    // Something to land on for whoever jumped past the end.
    stub.push(step(JUMP, 0, 0, 0));
    stub
}

#[cfg(test)]
mod tests;
