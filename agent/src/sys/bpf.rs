//! bpf(2), as far as a cgroup's device program needs it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// enum bpf_cmd, bpf_prog_type and bpf_attach_type of linux/bpf.h.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of cgroups below are run as well.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Times that loading is tried: the verifier gives up with EAGAIN when a signal comes, such as the
/// end of a child.
const TRIES: u32 = 64;

/// union bpf_attr for BPF_PROG_LOAD, up to prog_flags.
#[repr(C)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// union bpf_attr for BPF_PROG_ATTACH, up to attach_flags.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Has the kernel ask an eBPF program whether a process of `cgroup` may use a device.
pub(crate) fn attach_device_program(cgroup: &impl AsFd, instructions: &[u64]) -> io::Result<()> {
    let load = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: instructions.len().try_into().map_err(io::Error::other)?,
        instructions: address(instructions.as_ptr()),
        license: address(c"GPL".as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let mut loaded = bpf(BPF_PROG_LOAD, &load);
    for _ in 1..TRIES {
        match &loaded {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                loaded = bpf(BPF_PROG_LOAD, &load);
            }
            _ => break,
        }
    }
    let program = loaded?;
    // SAFETY: the kernel has just made the descriptor, and nothing else knows it.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let attach = Attach {
        target: cgroup.as_fd().as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attach).map(drop)
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    let size = size_of::<T>();
    // SAFETY: `attributes` is the part of union bpf_attr that the command reads, `size` its size,
    // and the addresses in it are of values that the callers hold.
    match unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size) } {
        -1 => Err(io::Error::last_os_error()),
        answer => RawFd::try_from(answer).map_err(io::Error::other),
    }
}
