//! The size of the machine, and where the host accounts for it.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

use super::{Error, HostFacts};
use crate::config::{MemorySize, Resolved, Vcpus};

const MIB: u64 = 1 << 20;
/// The kernel's period where a quota comes without one, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// What the machine is given.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) vcpus: u32,
    pub(super) memory: u64,
    pub(super) cpuset: String,
}

/// The least machine that lets the container use all of its limits; the exact limits are the
/// guest's cgroup's to enforce. Never more than the host has.
pub(super) fn shape(spec: &Spec, facts: &HostFacts, config: &Resolved) -> Result<Shape, Error> {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|r| r.cpu().as_ref());
    let cpuset = cpu.and_then(|cpu| cpu.cpus().clone()).unwrap_or_default();
    Ok(Shape {
        vcpus: vcpus(cpu, &cpuset, facts, config)?,
        memory: memory(resources, facts, config),
        cpuset,
    })
}

fn vcpus(
    cpu: Option<&LinuxCpu>,
    cpuset: &str,
    facts: &HostFacts,
    config: &Resolved,
) -> Result<u32, Error> {
    let by_quota = cpu.and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?)
            .ok()
            .filter(|quota| *quota > 0)?;
        let period = cpu
            .period()
            .filter(|period| *period > 0)
            .unwrap_or(DEFAULT_PERIOD);
        Some(quota.div_ceil(period))
    });
    let by_set = match cpuset {
        "" => None,
        set => Some(check_cpuset(set)?),
    };
    let wanted = match (by_quota, by_set) {
        (Some(quota), Some(set)) => quota.min(set),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => u64::from(config.vm.vcpus.0),
    };
    let most = facts.cpus.clamp(1, Vcpus::MAX);
    Ok(u32::try_from(wanted).unwrap_or(most).clamp(1, most))
}

/// How many processors a cpuset list names, if it is one.
pub(super) fn check_cpuset(set: &str) -> Result<u64, Error> {
    cpuset_len(set).ok_or_else(|| Error::Invalid {
        key: "linux.resources.cpu.cpus".into(),
        value: set.to_owned(),
        expected: "a list of processors such as \"0-3,8\"",
    })
}

/// How many processors a cpuset list names.
fn cpuset_len(set: &str) -> Option<u64> {
    set.split(',').try_fold(0u64, |count, range| {
        let range = range.trim();
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        count.checked_add(u64::from(last.checked_sub(first)?) + 1)
    })
}

fn memory(resources: Option<&LinuxResources>, facts: &HostFacts, config: &Resolved) -> u64 {
    let limit = resources
        .and_then(|r| r.memory().as_ref())
        .and_then(|memory| memory.limit())
        // Zero and below mean no limit.
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit > 0);
    let wanted = match limit {
        Some(limit) => limit.saturating_add(config.vm.memory_overhead.0),
        None => config.vm.memory.0,
    };
    let most = facts.memory.clamp(MemorySize::MIN, MemorySize::MAX);
    wanted
        .min(most)
        .max(MemorySize::MIN)
        .div_ceil(MIB)
        .saturating_mul(MIB)
}

/// The cgroup containerd chose for the container, below each hierarchy's root.
///
/// A systemd-style `slice:prefix:name` becomes the directory systemd would make of it.
pub(super) fn host_cgroup(spec: &Spec) -> Result<Option<PathBuf>, Error> {
    let Some(path) = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_ref())
    else {
        return Ok(None);
    };
    let text = path.to_string_lossy();
    let path = match text.split(':').collect::<Vec<_>>().as_slice() {
        [""] => return Ok(None),
        [path] => PathBuf::from(path),
        [slice, prefix, name] => systemd_path(slice, prefix, name),
        _ => return Err(invalid_cgroup(&text)),
    };
    let relative = path.strip_prefix("/").unwrap_or(&path);
    let plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !plain || relative == Path::new("") {
        return Err(invalid_cgroup(&text));
    }
    Ok(Some(relative.to_path_buf()))
}

fn invalid_cgroup(text: &str) -> Error {
    Error::Invalid {
        key: "linux.cgroupsPath".into(),
        value: text.to_owned(),
        expected: "a path below the cgroup root without \"..\", or slice:prefix:name",
    }
}

/// `a-b.slice` lies in `a.slice`; the unit is a scope in it.
fn systemd_path(slice: &str, prefix: &str, name: &str) -> PathBuf {
    let mut path = PathBuf::new();
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    for (end, _) in stem.match_indices('-') {
        path.push(format!("{}.slice", &stem[..end]));
    }
    if !stem.is_empty() && stem != "-" {
        path.push(format!("{stem}.slice"));
    }
    path.push(match prefix {
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    });
    path
}
