use super::*;

/// Runs a filter as the kernel would, for the instructions that are used here and by libseccomp.
fn ask(program: &[libc::sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let word = |at: u32| match at {
        NUMBER => number,
        ARCHITECTURE => architecture,
        at => {
            let argument = arguments[(at as usize - 16) / 8];
            if at % 8 == 0 {
                argument as u32
            } else {
                (argument >> 32) as u32
            }
        }
    };
    let (mut at, mut value) = (0, 0);
    loop {
        let step = program[at];
        at += 1;
        let mut jump = |taken: bool| at += usize::from(if taken { step.jt } else { step.jf });
        match step.code {
            LOAD => value = word(step.k),
            0x54 => value &= step.k,
            JUMP_EQUAL => jump(value == step.k),
            JUMP_GREATER => jump(value > step.k),
            JUMP_GREATER_EQUAL => jump(value >= step.k),
            0x45 => jump(value & step.k != 0),
            JUMP => at += step.k as usize,
            RETURN => return step.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

/// The architecture this is built for, as the audit subsystem numbers it (linux/audit.h).
const NATIVE: u32 = if cfg!(target_arch = "aarch64") {
    0xc000_00b7
} else {
    0xc000_003e
};
const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;

fn filter(profile: serde_json::Value) -> Filter {
    Filter::of(&serde_json::from_value(profile).unwrap()).unwrap()
}

/// Those that Docker names on a host of this architecture, without 32-bit arm.
fn architectures() -> &'static [&'static str] {
    if cfg!(target_arch = "aarch64") {
        &["SCMP_ARCH_AARCH64"]
    } else {
        &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    }
}

/// The part of Docker's profile that has one of each kind of rule.
fn docker() -> serde_json::Value {
    serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures(),
        "syscalls": [
            {"names": ["read", "openat2", "nosuchcall"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288_u32, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
        ]
    })
}

#[test]
fn a_profile_means_what_it_says() {
    let filter = filter(docker());
    let ask = |number: i64, argument| {
        let number = u32::try_from(number).unwrap();
        ask(&filter.program, NATIVE, number, [argument, 0, 0, 0, 0, 0])
    };
    assert_eq!(ask(libc::SYS_read, 0), ALLOW);
    assert_eq!(ask(libc::SYS_mount, 0), EPERM);
    assert_eq!(ask(libc::SYS_clone3, 0), ENOSYS);
    assert_eq!(ask(libc::SYS_clone, 0x11), ALLOW, "fork");
    assert_eq!(ask(libc::SYS_clone, 0x1000_0000), EPERM, "a user namespace");
    assert_eq!(ask(libc::SYS_personality, 8), ALLOW);
    assert_eq!(ask(libc::SYS_personality, 9), EPERM);
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let filter = filter(docker());
    let newest = u32::try_from(libc::SYS_openat2).unwrap();
    let ask = |architecture, number| ask(&filter.program, architecture, number, [0; 6]);
    assert_eq!(ask(NATIVE, newest), ALLOW);
    assert_eq!(ask(NATIVE, newest + 1), ENOSYS);
    assert_eq!(ask(NATIVE, newest - 4), EPERM);
}

/// Architectures that share x86_64's kernel.
#[cfg(target_arch = "x86_64")]
#[test]
fn calls_newer_than_the_profile_do_not_exist_for_x32_and_32_bit_programs() {
    const I386: u32 = 0x4000_0003;
    let filter = filter(docker());
    let ask = |architecture, number| ask(&filter.program, architecture, number, [0; 6]);
    assert_eq!(ask(NATIVE, X32), ALLOW, "read by x32");
    assert_eq!(ask(NATIVE, X32 | 2000), ENOSYS);
    // read and openat2 of 32-bit programs
    assert_eq!(ask(I386, 3), ALLOW);
    assert_eq!(ask(I386, 437), ALLOW);
    assert_eq!(ask(I386, 438), ENOSYS);
    assert_eq!(ask(I386, 21), EPERM);
}

#[test]
fn what_is_allowed_by_default_stays_so() {
    let filter = filter(serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
    }));
    let ask = |number| ask(&filter.program, NATIVE, number, [0; 6]);
    assert_eq!(ask(5000), ALLOW);
    assert_eq!(ask(u32::try_from(libc::SYS_mkdirat).unwrap()), EPERM);
}

#[test]
fn an_argument_compared_twice_means_either() {
    let filter = filter(serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
            {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]
    }));
    let socket = u32::try_from(libc::SYS_socket).unwrap();
    let ask = |family| ask(&filter.program, NATIVE, socket, [family, 0, 0, 0, 0, 0]);
    assert_eq!([ask(1), ask(2), ask(40)], [ALLOW, ALLOW, EPERM]);
}

#[test]
fn a_filter_is_kept_in_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("seccomp");
    assert!(Filter::read(&path).unwrap().is_none());
    let filter = filter(docker());
    filter.write(&path).unwrap();
    let read = Filter::read(&path).unwrap().unwrap();
    assert_eq!((read.flags, read.program.len()), (4, filter.program.len()));
    assert!(
        read.program
            .iter()
            .zip(&filter.program)
            .all(|(a, b)| a.k == b.k && a.jt == b.jt)
    );
    fs::write(&path, [0; 11]).unwrap();
    assert!(Filter::read(&path).is_err());
}

#[test]
fn flags_are_those_of_the_profile_or_runcs() {
    let flags = |flags: serde_json::Value| {
        let profile = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags});
        filter(profile).flags
    };
    assert_eq!(flags(serde_json::json!([])), 0);
    assert_eq!(flags(serde_json::json!(["SECCOMP_FILTER_FLAG_LOG"])), 2);
    assert_eq!(
        filter(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW"})).flags,
        4
    );
}
