//! Every key of the OCI schema is kept, left out with a note, replaced by our own, or refused by
//! name: one table, compared with the types so that no key is forgotten.

use serde_json::{Value, json};

use super::{CTR_2_1, overlay, plan_of};
use crate::plan::{Error, Plan};

const EVERY_KEY: &str = include_str!("../testdata/every-key.json");

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// The guest gets it as it is.
    Kept,
    /// The guest doesn't get it; the log says so under this name.
    LeftOut(&'static str),
    /// The guest gets something of ours instead.
    Ours,
    /// The host runs it.
    OnHost(&'static str),
    /// It means nothing where its neighbours are refused or left out.
    WithOthers,
    /// Create fails with an error that holds this.
    Refused(&'static str),
}

use Fate::{Kept, LeftOut, OnHost, Ours, Refused, WithOthers};

/// By JSON pointer; one holds for all below it that has no line of its own.
const TABLE: &[(&str, Fate)] = &[
    ("/ociVersion", Kept),
    ("/root/path", Ours),
    ("/root/readonly", Kept),
    ("/hostname", Kept),
    ("/domainname", Kept),
    ("/annotations", Kept),
    ("/process/terminal", Kept),
    ("/process/consoleSize", Kept),
    ("/process/user/uid", Kept),
    ("/process/user/gid", Kept),
    ("/process/user/umask", Kept),
    ("/process/user/additionalGids", Kept),
    ("/process/user/username", LeftOut("process.user.username")),
    ("/process/args", Kept),
    ("/process/commandLine", LeftOut("process.commandLine")),
    ("/process/env", Kept),
    ("/process/cwd", Kept),
    ("/process/capabilities", Kept),
    ("/process/rlimits", Kept),
    ("/process/noNewPrivileges", Kept),
    (
        "/process/apparmorProfile",
        LeftOut("process.apparmorProfile"),
    ),
    ("/process/oomScoreAdj", Kept),
    ("/process/selinuxLabel", LeftOut("process.selinuxLabel")),
    ("/process/ioPriority", Kept),
    ("/process/scheduler", Kept),
    (
        "/process/execCPUAffinity",
        Refused("process.execCPUAffinity"),
    ),
    ("/mounts/0/destination", Kept),
    ("/mounts/0/type", Kept),
    ("/mounts/0/source", Kept),
    ("/mounts/0/options", Kept),
    ("/mounts/0/uidMappings", Refused("The mount at /tmp")),
    ("/mounts/0/gidMappings", Refused("The mount at /tmp")),
    ("/hooks/prestart", OnHost("prestart")),
    ("/hooks/createRuntime", OnHost("create_runtime")),
    ("/hooks/createContainer", Refused("hooks.createContainer")),
    ("/hooks/startContainer", Refused("hooks.startContainer")),
    ("/hooks/poststart", OnHost("poststart")),
    ("/hooks/poststop", OnHost("poststop")),
    ("/linux/netDevices", Refused("linux.netDevices")),
    ("/linux/uidMappings", Refused("linux.uidMappings")),
    ("/linux/gidMappings", Refused("linux.gidMappings")),
    ("/linux/sysctl", Kept),
    ("/linux/resources/devices", Kept),
    ("/linux/resources/memory/limit", Kept),
    ("/linux/resources/memory/reservation", Kept),
    ("/linux/resources/memory/swap", Kept),
    (
        "/linux/resources/memory/kernel",
        LeftOut("linux.resources.memory.kernel"),
    ),
    (
        "/linux/resources/memory/kernelTCP",
        LeftOut("linux.resources.memory.kernelTCP"),
    ),
    (
        "/linux/resources/memory/swappiness",
        LeftOut("linux.resources.memory.swappiness"),
    ),
    (
        "/linux/resources/memory/disableOOMKiller",
        LeftOut("linux.resources.memory.disableOOMKiller"),
    ),
    (
        "/linux/resources/memory/useHierarchy",
        LeftOut("linux.resources.memory.useHierarchy"),
    ),
    ("/linux/resources/memory/checkBeforeUpdate", Kept),
    ("/linux/resources/cpu/shares", Kept),
    ("/linux/resources/cpu/quota", Kept),
    ("/linux/resources/cpu/burst", Kept),
    ("/linux/resources/cpu/period", Kept),
    ("/linux/resources/cpu/idle", Kept),
    (
        "/linux/resources/cpu/realtimeRuntime",
        Refused("linux.resources.cpu.realtimeRuntime"),
    ),
    (
        "/linux/resources/cpu/realtimePeriod",
        Refused("linux.resources.cpu.realtimePeriod"),
    ),
    (
        "/linux/resources/cpu/cpus",
        LeftOut("linux.resources.cpu.cpus"),
    ),
    (
        "/linux/resources/cpu/mems",
        LeftOut("linux.resources.cpu.mems"),
    ),
    ("/linux/resources/pids", Kept),
    (
        "/linux/resources/blockIO/weight",
        LeftOut("linux.resources.blockIO.weight"),
    ),
    (
        "/linux/resources/blockIO/leafWeight",
        LeftOut("linux.resources.blockIO.weight"),
    ),
    (
        "/linux/resources/blockIO/weightDevice",
        Refused("linux.resources.blockIO.weightDevice"),
    ),
    (
        "/linux/resources/blockIO/throttleReadBpsDevice",
        Refused("linux.resources.blockIO.throttleReadBpsDevice"),
    ),
    (
        "/linux/resources/blockIO/throttleWriteBpsDevice",
        Refused("linux.resources.blockIO.throttleWriteBpsDevice"),
    ),
    (
        "/linux/resources/blockIO/throttleReadIOPSDevice",
        Refused("linux.resources.blockIO.throttleReadIOPSDevice"),
    ),
    (
        "/linux/resources/blockIO/throttleWriteIOPSDevice",
        Refused("linux.resources.blockIO.throttleWriteIOPSDevice"),
    ),
    (
        "/linux/resources/hugepageLimits",
        LeftOut("linux.resources.hugepageLimits"),
    ),
    (
        "/linux/resources/network/classID",
        Refused("linux.resources.network"),
    ),
    (
        "/linux/resources/network/priorities",
        Refused("linux.resources.network"),
    ),
    ("/linux/resources/rdma", Refused("linux.resources.rdma")),
    ("/linux/resources/unified", Kept),
    ("/linux/cgroupsPath", Ours),
    ("/linux/namespaces/0/type", Kept),
    ("/linux/namespaces/0/path", Refused("linux.namespaces pid")),
    ("/linux/devices", Kept),
    ("/linux/seccomp/defaultAction", Kept),
    ("/linux/seccomp/defaultErrnoRet", Kept),
    ("/linux/seccomp/architectures", Kept),
    ("/linux/seccomp/flags", Kept),
    (
        "/linux/seccomp/listenerPath",
        Refused("linux.seccomp.listenerPath"),
    ),
    // Its meaning is the listener's.
    ("/linux/seccomp/listenerMetadata", WithOthers),
    ("/linux/seccomp/syscalls", Kept),
    ("/linux/rootfsPropagation", Kept),
    ("/linux/maskedPaths", Kept),
    ("/linux/readonlyPaths", Kept),
    ("/linux/mountLabel", LeftOut("linux.mountLabel")),
    ("/linux/intelRdt", Refused("linux.intelRdt")),
    ("/linux/memoryPolicy", Refused("linux.memoryPolicy")),
    ("/linux/personality/domain", Kept),
    (
        "/linux/personality/flags",
        Refused("linux.personality.flags"),
    ),
    ("/linux/timeOffsets", Kept),
    ("/vm", Refused("vm")),
    ("/solaris", LeftOut("solaris")),
    ("/windows", LeftOut("windows")),
    ("/zos", LeftOut("zos")),
];

fn every_key() -> Value {
    serde_json::from_str(EVERY_KEY).expect("JSON")
}

/// The line for a pointer: the longest that it begins with.
fn line(pointer: &str) -> Option<&'static (&'static str, Fate)> {
    let below = |line: &&(&str, Fate)| {
        let rest = pointer.strip_prefix(line.0);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    TABLE.iter().filter(below).max_by_key(|line| line.0.len())
}

/// Pointers to everything that has nothing below it.
fn leaves(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                leaves(value, &format!("{at}/{}", key.replace('/', "~1")), found);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, value) in list.iter().enumerate() {
                leaves(value, &format!("{at}/{index}"), found);
            }
        }
        _ => found.push(at.to_owned()),
    }
}

/// Puts what the example has at `pointer` into `spec`.
fn put(spec: &mut Value, pointer: &str) {
    let value = every_key()
        .pointer(pointer)
        .expect("in the example")
        .clone();
    let mut place = spec;
    for name in pointer.split('/').skip(1) {
        if let Ok(index) = name.parse::<usize>() {
            if !place.is_array() {
                *place = json!([]);
            }
            let list = place.as_array_mut().expect("an array");
            list.resize_with(list.len().max(index + 1), || json!({}));
            place = &mut list[index];
        } else {
            place = &mut place[name];
        }
    }
    *place = value;
}

/// The plan for ctr's plain spec with one key of the example, and what that cannot be without.
fn plan_with(pointer: &str) -> Result<Plan, Error> {
    let mut spec: Value = serde_json::from_str(CTR_2_1).expect("JSON");
    if pointer.starts_with("/mounts") {
        spec["mounts"] = json!([{"destination": "/tmp", "type": "tmpfs"}]);
    }
    if pointer.starts_with("/linux/seccomp") {
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO"});
    }
    if pointer.starts_with("/linux/personality") {
        spec["linux"]["personality"] = json!({"domain": "LINUX"});
    }
    if pointer.starts_with("/linux/timeOffsets") {
        let namespaces = spec["linux"]["namespaces"]
            .as_array_mut()
            .expect("an array");
        namespaces.push(json!({"type": "time"}));
    }
    put(&mut spec, pointer);
    plan_of(&spec.to_string(), vec![overlay(1)])
}

#[test]
fn the_example_has_every_key_of_the_types() {
    let spec: oci_spec::runtime::Spec = serde_json::from_str(EVERY_KEY).expect("spec");
    let mut told = spec.clone();
    // Of other systems; each is left out whole.
    told.set_solaris(None).set_windows(None).set_zos(None);
    let text = format!("{told:?}");
    let missing: Vec<&str> = text
        .match_indices(": None")
        .map(|(at, _)| text[..at].rsplit([' ', '{']).next().unwrap_or_default())
        .collect();
    // The last two are fields of the type, but no keys of the specification.
    let expected = ["solaris", "windows", "zos", "uid_mappings", "gid_mappings"];
    assert_eq!(missing, expected);
}

#[test]
fn every_key_has_a_line() {
    let mut all = Vec::new();
    leaves(&every_key(), "", &mut all);
    let without: Vec<&String> = all.iter().filter(|leaf| line(leaf).is_none()).collect();
    assert!(without.is_empty(), "{without:#?}");
    for (pointer, _) in TABLE {
        assert!(
            every_key().pointer(pointer).is_some(),
            "{pointer} is no key"
        );
    }
}

#[test]
fn every_key_fares_as_its_line_says() {
    let mut wrong = Vec::new();
    for (pointer, fate) in TABLE {
        let expected = every_key()
            .pointer(pointer)
            .expect("in the example")
            .clone();
        let planned = plan_with(pointer);
        let good = match (fate, &planned) {
            (Refused(name), Err(error)) => error.to_string().contains(name),
            (Refused(_), Ok(_)) | (_, Err(_)) => false,
            (fate, Ok(plan)) => {
                let plan_json = plan.to_json().expect("JSON");
                let guest = &plan_json["guest_spec"];
                let found = guest.pointer(pointer);
                let noted = |name: &str| plan.left_out.iter().any(|note| note.key == name);
                match fate {
                    Kept => found == Some(&expected),
                    LeftOut(name) => found.is_none() && noted(name),
                    Ours => {
                        found.is_some_and(|found| *found != expected || *pointer == "/root/path")
                    }
                    OnHost(list) => found.is_none() && plan_json["hooks"][list] == expected,
                    WithOthers => true,
                    Refused(_) => false,
                }
            }
        };
        if !good {
            let outcome = planned.map(|plan| plan.left_out);
            wrong.push(format!("{pointer}: {fate:?}, but {outcome:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
