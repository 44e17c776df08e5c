//! Questions that only system calls answer.
#![allow(unsafe_code)]

use nix::libc;
use serde_json::{Value, json};

/// A system call by number: its result, or the error's number.
pub(crate) fn call(number: libc::c_long, arguments: [u64; 5]) -> Result<i64, i32> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: callers pass numbers, or addresses of values of their own that live past the call
    // and are as large as the kernel takes them to be.
    match unsafe { libc::syscall(number, a, b, c, d, e) } {
        -1 => Err(nix::errno::Errno::last_raw()),
        result => Ok(result),
    }
}

fn told(result: Result<i64, i32>) -> Value {
    result.map_or_else(|errno| json!({ "errno": errno }), Value::from)
}

pub(crate) fn personality() -> Value {
    // 0xffffffff asks without changing.
    told(call(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0]))
}

/// struct sched_attr's first 48 bytes, by sched_getattr(2).
pub(crate) fn scheduler() -> Value {
    let mut attributes = [0_u64; 6];
    let address = attributes.as_mut_ptr().expose_provenance() as u64;
    if let Err(errno) = call(libc::SYS_sched_getattr, [0, address, 48, 0, 0]) {
        return json!({ "errno": errno });
    }
    let [head, flags, middle, runtime, deadline, period] = attributes;
    // On kernels that have it, SCHED_OTHER tells its slice as runtime.
    let deadlines = if head >> 32 == 6 {
        json!([runtime, deadline, period])
    } else {
        Value::Null
    };
    json!({
        "policy": head >> 32,
        "flags": flags,
        "nice": (middle & 0xffff_ffff) as u32 as i32,
        "priority": middle >> 32,
        "deadline": deadlines,
    })
}

pub(crate) fn io_priority() -> Value {
    // IOPRIO_WHO_PROCESS; the class is in the bits from 13.
    match call(libc::SYS_ioprio_get, [1, 0, 0, 0, 0]) {
        Ok(value) => json!({ "class": value >> 13, "priority": value & 0x1fff }),
        Err(errno) => json!({ "errno": errno }),
    }
}

pub(crate) fn nice() -> Value {
    // The call itself answers 20 minus the nice value.
    told(call(libc::SYS_getpriority, [0, 0, 0, 0, 0]).map(|value| 20 - value))
}

pub(crate) fn processors_it_may_use() -> Value {
    let mut mask = [0_u64; 16];
    let address = mask.as_mut_ptr().expose_provenance() as u64;
    match call(libc::SYS_sched_getaffinity, [0, 128, address, 0, 0]) {
        Ok(_) => json!(mask.iter().map(|word| word.count_ones()).sum::<u32>()),
        Err(errno) => json!({ "errno": errno }),
    }
}

pub(crate) fn secure_bits() -> Value {
    told(call(
        libc::SYS_prctl,
        [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0],
    ))
}

pub(crate) fn dumpable() -> Value {
    told(call(
        libc::SYS_prctl,
        [libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0],
    ))
}

/// Who the process is, as the kernel answers the process itself.
pub(crate) fn ids() -> Value {
    let three = |number| {
        let mut ids = [0_u32; 3];
        let [real, effective, saved] = ids
            .each_mut()
            .map(|id| std::ptr::from_mut(id).expose_provenance() as u64);
        let asked = call(number, [real, effective, saved, 0, 0]);
        asked.map_or_else(|errno| json!({ "errno": errno }), |_| json!(ids))
    };
    let mut groups = [0_u32; 64];
    let address = groups.as_mut_ptr().expose_provenance() as u64;
    let member = call(libc::SYS_getgroups, [groups.len() as u64, address, 0, 0, 0]);
    json!({
        "user": three(libc::SYS_getresuid),
        "group": three(libc::SYS_getresgid),
        "groups": member.map_or_else(
            |errno| json!({ "errno": errno }),
            |count| json!(groups.iter().take(count.unsigned_abs() as usize).collect::<Vec<_>>()),
        ),
        "file_system": [
            told(call(libc::SYS_setfsuid, [u64::MAX, 0, 0, 0, 0])),
            told(call(libc::SYS_setfsgid, [u64::MAX, 0, 0, 0, 0])),
        ],
    })
}

pub(crate) fn umask() -> Value {
    let mask = call(libc::SYS_umask, [0o22, 0, 0, 0, 0]);
    if let Ok(mask) = mask {
        let _ = call(libc::SYS_umask, [mask.unsigned_abs(), 0, 0, 0, 0]);
    }
    mask.map_or(Value::Null, |mask| json!(format!("{mask:04o}")))
}

pub(crate) fn is_session_leader() -> bool {
    let session = call(libc::SYS_getsid, [0; 5]);
    session == call(libc::SYS_getpid, [0; 5])
}

/// The terminal's size, or why there is none.
pub(crate) fn window() -> Value {
    let mut size = [0_u16; 4];
    let address = size.as_mut_ptr().expose_provenance() as u64;
    match call(libc::SYS_ioctl, [1, libc::TIOCGWINSZ, address, 0, 0]) {
        Ok(_) => json!({ "rows": size[0], "columns": size[1] }),
        Err(errno) => json!({ "errno": errno }),
    }
}

pub(crate) fn names() -> Value {
    let name = rustix::system::uname();
    json!({
        "host": name.nodename().to_string_lossy(),
        "domain": name.domainname().to_string_lossy(),
        "machine": name.machine().to_string_lossy(),
    })
}

pub(crate) fn wait_for_a_signal() {
    // Of nothing, and for ever: what pause is where there is a call of that name.
    let _ = call(libc::SYS_ppoll, [0; 5]);
}
