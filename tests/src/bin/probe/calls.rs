//! Calls that a container may or may not make, with arguments that do no harm where they succeed.

use std::ffi::CStr;

use nix::libc;
use serde_json::{Map, Value, json};

use crate::sys::call;

/// The error of each call by name, 0 for success.
pub(crate) fn errors() -> Value {
    let mut errors = Map::new();
    let mut tell = |name: &str, result: Result<i64, i32>| {
        errors.insert(name.to_owned(), json!(result.err().unwrap_or(0)));
    };
    let text = |text: &'static CStr| text.as_ptr().expose_provenance() as u64;
    let root = text(c"/");

    let mut random = [0_u64; 2];
    let random = random.as_mut_ptr().expose_provenance() as u64;
    // Without waiting: GRND_NONBLOCK.
    tell(
        "getrandom",
        call(libc::SYS_getrandom, [random, 16, 1, 0, 0]),
    );
    let times = [0_u32; 2];
    let zone = times.as_ptr().expose_provenance() as u64;
    tell(
        "settimeofday of a zone",
        call(libc::SYS_settimeofday, [0, zone, 0, 0, 0]),
    );
    let timex = [0_u64; 32];
    let timex = timex.as_ptr().expose_provenance() as u64;
    tell(
        "adjtimex to look",
        call(libc::SYS_adjtimex, [timex, 0, 0, 0, 0]),
    );
    tell(
        "sethostname too long",
        call(libc::SYS_sethostname, [root, 1000, 0, 0, 0]),
    );
    tell(
        "setdomainname too long",
        call(libc::SYS_setdomainname, [root, 1000, 0, 0, 0]),
    );
    tell("chroot", call(libc::SYS_chroot, [root, 0, 0, 0, 0]));
    tell(
        "mount of an unknown type",
        call(
            libc::SYS_mount,
            [root, text(c"/proc"), text(c"nosuchfs"), 0, 0],
        ),
    );
    tell(
        "umount of no mount",
        call(libc::SYS_umount2, [text(c"/bin"), 0, 0, 0, 0]),
    );
    tell(
        "pivot_root of no mount",
        call(
            libc::SYS_pivot_root,
            [text(c"/bin"), text(c"/bin"), 0, 0, 0],
        ),
    );
    // Wrong magic: permission is looked at first.
    tell("reboot", call(libc::SYS_reboot, [1, 2, 3, 0, 0]));
    tell(
        "swapon",
        call(libc::SYS_swapon, [text(c"/nosuchfile"), 0, 0, 0, 0]),
    );
    tell(
        "init_module",
        call(libc::SYS_init_module, [0, 0, root, 0, 0]),
    );
    tell(
        "delete_module",
        call(libc::SYS_delete_module, [text(c"nosuchmodule"), 0, 0, 0, 0]),
    );
    tell(
        "kexec_load",
        call(libc::SYS_kexec_load, [0, 0, 0, 0xffff, 0]),
    );
    #[cfg(target_arch = "x86_64")]
    tell("iopl", call(libc::SYS_iopl, [3, 0, 0, 0, 0]));
    tell("syslog size", call(libc::SYS_syslog, [10, 0, 0, 0, 0]));
    tell(
        "acct off",
        call(libc::SYS_acct, [text(c"/nosuchfile"), 0, 0, 0, 0]),
    );
    tell(
        "quotactl",
        call(libc::SYS_quotactl, [0x8000_0100, 0, 0, 0, 0]),
    );
    tell(
        "bpf of no command",
        call(libc::SYS_bpf, [0xffff, 0, 0, 0, 0]),
    );
    tell(
        "perf_event_open of nothing",
        call(libc::SYS_perf_event_open, [0, 0, 0, 0, 0]),
    );
    tell(
        "userfaultfd of wrong flags",
        call(libc::SYS_userfaultfd, [0xffff_ffff, 0, 0, 0, 0]),
    );
    tell(
        "keyctl of the session",
        call(libc::SYS_keyctl, [0, 0xffff_ffff_ffff_fffd, 0, 0, 0]).map(|_| 0),
    );
    tell(
        "add_key of an unknown type",
        call(
            libc::SYS_add_key,
            [text(c"nosuchtype"), root, 0, 0, 0xffff_ffff_ffff_fffd],
        ),
    );
    tell(
        "open_by_handle_at",
        call(libc::SYS_open_by_handle_at, [0, 0, 0, 0, 0]),
    );
    tell(
        "fanotify_init of wrong flags",
        call(libc::SYS_fanotify_init, [0xffff_ffff, 0, 0, 0, 0]),
    );
    tell(
        "io_uring_setup of nothing",
        call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]),
    );
    tell(
        "personality of ADDR_NO_RANDOMIZE",
        call(libc::SYS_personality, [0x004_0000, 0, 0, 0, 0]),
    );
    tell(
        "personality back",
        call(libc::SYS_personality, [0, 0, 0, 0, 0]),
    );
    tell(
        "personality of another kind",
        call(libc::SYS_personality, [0x0000_0009, 0, 0, 0, 0]),
    );
    tell(
        "setpriority -5",
        call(libc::SYS_setpriority, [0, 0, 0xffff_ffff_ffff_fffb, 0, 0]),
    );
    tell(
        "sched_setscheduler FIFO of no priority",
        call(libc::SYS_sched_setscheduler, [0, 1, 0, 0, 0]),
    );
    tell(
        "ptrace of process 1",
        call(libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), 1, 0, 0, 0]),
    );
    tell(
        "process_vm_readv of process 1",
        call(libc::SYS_process_vm_readv, [1, 0, 0, 0, 0]),
    );
    tell("kcmp", call(libc::SYS_kcmp, [1, 1, 1, 0, 0]));
    tell(
        "kill of process 1 with 0",
        call(libc::SYS_kill, [1, 0, 0, 0, 0]),
    );
    tell("setuid 12345 and back", setuid());
    tell("setgroups none", call(libc::SYS_setgroups, [0, 0, 0, 0, 0]));
    tell(
        "socket raw",
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
    );
    tell("socket packet", socket(libc::AF_PACKET, libc::SOCK_RAW, 0));
    tell("socket stream", socket(libc::AF_INET, libc::SOCK_STREAM, 0));
    tell(
        "socket netlink",
        socket(libc::AF_NETLINK, libc::SOCK_RAW, 0),
    );
    tell("socket vsock", socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0));
    tell("a call no kernel has", call(100_000, [0; 5]));
    // Newer than any list of calls: programs take ENOSYS for "do it the old way", nothing else.
    tell("a call newer than the profile", call(600, [0; 5]));
    for (name, kind, major, minor) in [
        ("null", libc::S_IFCHR, 1, 3),
        ("mem", libc::S_IFCHR, 1, 1),
        ("kmsg", libc::S_IFCHR, 1, 11),
        ("console of the kernel", libc::S_IFCHR, 5, 1),
        ("an unknown disk", libc::S_IFBLK, 250, 7),
    ] {
        tell(
            &format!("mknod and open {name}"),
            device(kind, major, minor),
        );
    }
    tell("mknod of a fifo", mknod(libc::S_IFIFO, 0, 0));
    for (name, flags) in [
        ("user", libc::CLONE_NEWUSER),
        ("uts", libc::CLONE_NEWUTS),
        ("cgroup", libc::CLONE_NEWCGROUP),
        ("mount", libc::CLONE_NEWNS),
    ] {
        let flags = u64::from(flags.unsigned_abs());
        tell(
            &format!("unshare {name}"),
            call(libc::SYS_unshare, [flags, 0, 0, 0, 0]),
        );
    }
    Value::Object(errors)
}

fn setuid() -> Result<i64, i32> {
    let keep = u64::MAX;
    let changed = call(libc::SYS_setresuid, [keep, 12345, keep, 0, 0]);
    if changed.is_ok() {
        call(libc::SYS_setresuid, [keep, 0, keep, 0, 0])?;
    }
    changed
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> Result<i64, i32> {
    let number = |value: libc::c_int| u64::from(value.unsigned_abs());
    let opened = call(
        libc::SYS_socket,
        [number(family), number(kind), number(protocol), 0, 0],
    )?;
    call(libc::SYS_close, [opened.unsigned_abs(), 0, 0, 0, 0])
}

const NODE: &CStr = c"/tmp/probe-node";
/// `AT_FDCWD`, for the calls that arm64 has as well.
const HERE: u64 = libc::AT_FDCWD as i64 as u64;

fn mknod(kind: libc::mode_t, major: u32, minor: u32) -> Result<i64, i32> {
    let node = NODE.as_ptr().expose_provenance() as u64;
    let mode = u64::from(kind | 0o666);
    let made = call(
        libc::SYS_mknodat,
        [HERE, node, mode, libc::makedev(major, minor), 0],
    );
    if made.is_ok() {
        call(libc::SYS_unlinkat, [HERE, node, 0, 0, 0])?;
    }
    made
}

/// Makes a device file and opens it: what a rule for the device forbids is either.
fn device(kind: libc::mode_t, major: u32, minor: u32) -> Result<i64, i32> {
    let node = NODE.as_ptr().expose_provenance() as u64;
    let mode = u64::from(kind | 0o666);
    call(
        libc::SYS_mknodat,
        [HERE, node, mode, libc::makedev(major, minor), 0],
    )?;
    let flags = (libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY).unsigned_abs();
    let opened = call(libc::SYS_openat, [HERE, node, u64::from(flags), 0, 0]);
    call(libc::SYS_unlinkat, [HERE, node, 0, 0, 0])?;
    let opened = opened.map_err(|errno| errno + 1000)?;
    call(libc::SYS_close, [opened.unsigned_abs(), 0, 0, 0, 0])
}
