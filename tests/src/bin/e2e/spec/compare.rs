//! Comparing what two processes saw.

use std::collections::BTreeMap;

use serde_json::Value;

/// Where the two may differ, and why. A pattern holds for everything below it; `*` stands for one
/// name.
pub(super) type Allowed = (&'static [&'static str], &'static str);

/// What any two processes may differ in.
const ALLOWED: &[Allowed] = &[
    (&["affinity"], "the machine has processors of its own"),
    (
        &["limits", "Max pending signals"],
        "by the machine's memory",
    ),
    (&["limits", "Max processes"], "by the machine's memory"),
    (
        &["cgroup"],
        "without a namespace the guest's path is seen, not the host's",
    ),
    (
        &["mounts", "/", "super_options"],
        "layers are the guest's own",
    ),
    (
        &["mounts", "/sys", "super_options"],
        "the mount is read-only, not the file system",
    ),
    (
        &["masked", "/sys/firmware", "write"],
        "the mount is read-only, not the file system",
    ),
    (
        &["mounts", "*", "propagation"],
        "shared propagation is the root's alone (docs/limitations.md)",
    ),
    (
        &["environment"],
        "HOME is set also where there is no variable at all",
    ),
    (&["signals_ignored"], "runc's language ignores one"),
    (&["status", "SigIgn"], "runc's language ignores one"),
    (&["devices", "/dev/core"], "the guest's kernel has no kcore"),
    (
        &["devices", "/dev/kcore"],
        "what libcontainer calls it where the kernel has one",
    ),
    (
        &["mounts", "/proc/acpi", "super_options"],
        "a mask is empty by what is in it, not by its size",
    ),
    (
        &["mounts", "/sys/firmware", "super_options"],
        "a mask is empty by what is in it, not by its size",
    ),
    (
        &["calls", "mknod and open console of the kernel"],
        "the machine's serial port prints a panic and is nothing to open",
    ),
    (&["masked", "/proc/kcore"], "the guest's kernel has none"),
    (&["mounts", "/proc/kcore"], "the guest's kernel has none"),
    (
        &["mounts", "/proc/sysrq-trigger"],
        "the guest's kernel has none",
    ),
    (
        &["masked", "/proc/sysrq-trigger"],
        "the guest's kernel has none",
    ),
    (
        &["masked", "/proc/acpi", "content"],
        "the machine's hardware",
    ),
    (
        &["masked", "/proc/keys", "content"],
        "no session's key is there",
    ),
    (&["calls", "acct off"], "not in the guest's kernel"),
    (&["calls", "delete_module"], "not in the guest's kernel"),
    (&["calls", "init_module"], "not in the guest's kernel"),
    (&["calls", "iopl"], "not in the guest's kernel"),
    (&["calls", "kexec_load"], "not in the guest's kernel"),
    (&["calls", "quotactl"], "not in the guest's kernel"),
    (
        &["calls", "mknod and open mem"],
        "not in the guest's kernel",
    ),
    (
        &["calls", "syslog size"],
        "the guest's kernel lets everybody read its log",
    ),
];

/// Everything in which `ours` differs from `theirs` and must not; `allowed` is of this process
/// alone.
pub(super) fn differences(ours: &Value, theirs: &Value, allowed: &[Allowed]) -> Vec<String> {
    let (ours, theirs) = (flat(ours), flat(theirs));
    let mut paths: Vec<&Vec<String>> = ours.keys().chain(theirs.keys()).collect();
    paths.sort();
    paths.dedup();
    let differ = paths
        .into_iter()
        .filter(|path| ours.get(*path) != theirs.get(*path));
    differ
        .filter(|path| {
            let mut all = ALLOWED.iter().chain(allowed);
            !all.any(|(pattern, _)| holds(pattern, path))
        })
        .map(|path| {
            let tell = |side: &BTreeMap<Vec<String>, Value>| {
                side.get(path)
                    .map_or_else(|| "nothing".to_owned(), Value::to_string)
            };
            format!(
                "{}: {}, runc: {}",
                path.join(" > "),
                tell(&ours),
                tell(&theirs)
            )
        })
        .collect()
}

fn holds(pattern: &[&str], path: &[String]) -> bool {
    path.len() >= pattern.len()
        && pattern
            .iter()
            .zip(path)
            .all(|(wanted, name)| *wanted == "*" || wanted == name)
}

/// Objects by the names that lead to their values; lists are values.
fn flat(value: &Value) -> BTreeMap<Vec<String>, Value> {
    let mut all = BTreeMap::new();
    let mut rest = vec![(Vec::new(), value)];
    while let Some((path, value)) = rest.pop() {
        match value {
            Value::Object(map) => rest.extend(map.iter().map(|(key, value)| {
                let mut path = path.clone();
                path.push(key.clone());
                (path, value)
            })),
            value => drop(all.insert(path, value.clone())),
        }
    }
    all
}
