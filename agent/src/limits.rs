//! Changing the limits of a container that runs, in the files of its cgroup.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use crate::error::Error;

/// What a file gets.
type Change = (String, String);

/// Applies to the cgroup at `directory` what `resources` says, or nothing of it.
pub(crate) fn apply(directory: &Path, resources: &LinuxResources) -> Result<(), Error> {
    let changes = plan(resources, |name| {
        fs::read_to_string(directory.join(name)).unwrap_or_default()
    })?;
    let mut done = Vec::new();
    for (name, value) in changes {
        let path = directory.join(&name);
        let before = fs::read_to_string(&path);
        if let Err(error) = fs::write(&path, &value) {
            for (path, before) in done.into_iter().rev() {
                if let Err(error) = fs::write(&path, before) {
                    tracing::warn!(?path, %error, "cannot take a limit back");
                }
            }
            let reason = match error.kind() {
                io::ErrorKind::NotFound => "the guest's cgroups have no such limit".to_owned(),
                _ => error.to_string(),
            };
            return Err(Error::invalid(
                "resources",
                format!("{name} = {value:?}: {reason}"),
            ));
        }
        if let Ok(before) = before {
            done.push((path, before));
        }
    }
    Ok(())
}

/// The files to write, in order. `now` reads one.
fn plan(resources: &LinuxResources, now: impl Fn(&str) -> String) -> Result<Vec<Change>, Error> {
    let mut changes = Vec::new();
    if let Some(limits) = resources.cpu() {
        cpu(limits, &now, &mut changes);
    }
    if let Some(limits) = resources.memory() {
        memory(limits, &now, &mut changes)?;
    }
    if let Some(limits) = resources.pids() {
        changes.push(("pids.max".to_owned(), pids(limits)));
    }
    if let Some(files) = resources.unified() {
        unified(files, &mut changes)?;
    }
    Ok(changes)
}

/// As libcontainer sets them at creation.
fn cpu(limits: &LinuxCpu, now: &impl Fn(&str) -> String, changes: &mut Vec<Change>) {
    let mut set = |name: &str, value: String| changes.push((name.to_owned(), value));
    if let Some(weight) = limits.shares().and_then(weight) {
        set("cpu.weight", weight.to_string());
    }
    // "quota period"; what is not given stays.
    let quota = limits.quota().filter(|quota| *quota != 0);
    let period = limits.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let max = now("cpu.max");
        let mut words = max.split_ascii_whitespace();
        let (old_quota, old_period) = (words.next(), words.next());
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            None => old_quota.unwrap_or("max").to_owned(),
        };
        let period = period.map(|period| period.to_string());
        let period = period.as_deref().or(old_period).unwrap_or("100000");
        set("cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = limits.burst() {
        set("cpu.max.burst", burst.to_string());
    }
    if let Some(idle) = limits.idle() {
        set("cpu.idle", idle.to_string());
    }
}

/// cgroup v1's shares (2 to 262144, 1024 usually) as cgroup v2's weight (1 to 10000, 100 usually):
/// the curve of runc and libcontainer. 0 means nothing.
fn weight(shares: u64) -> Option<u64> {
    match shares {
        0 => None,
        1..=2 => Some(1),
        262_144.. => Some(10_000),
        shares => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            Some((10f64.powf(exponent).ceil() as u64).clamp(1, 10_000))
        }
    }
}

fn memory(
    limits: &LinuxMemory,
    now: &impl Fn(&str) -> String,
    changes: &mut Vec<Change>,
) -> Result<(), Error> {
    let limit = limits.limit().filter(|limit| *limit != 0);
    let swap = limits.swap().filter(|swap| *swap != 0);
    let reservation = limits.reservation().filter(|low| *low != 0);
    for (name, value) in [
        ("limit", limit),
        ("swap", swap),
        ("reservation", reservation),
    ] {
        if let Some(value) = value.filter(|value| *value < -1) {
            let reason = format!("{name} is {value}; expected -1 for none, or bytes");
            return Err(Error::invalid("linux.resources.memory", reason));
        }
    }
    if let (Some(limit @ 1..), Some(true)) = (limit, limits.check_before_update()) {
        let usage = now("memory.current");
        let usage = usage.trim();
        if usage.parse::<i64>().is_ok_and(|usage| limit < usage) {
            // runc's words.
            let reason = format!(
                "rejecting memory limit {limit}, because it's lower than current usage {usage}"
            );
            return Err(Error::invalid("linux.resources.memory", reason));
        }
    }
    let mut set = |name: &str, value: String| changes.push((name.to_owned(), value));
    // The specification's swap is memory and swap together; cgroup v2's is swap alone.
    let swap = match (swap, limit) {
        (Some(swap @ 1..), Some(limit @ 1..)) if swap < limit => {
            let reason =
                format!("swap is {swap}, less than the limit of {limit}, which it includes");
            return Err(Error::invalid("linux.resources.memory", reason));
        }
        (Some(swap @ 1..), Some(limit @ 1..)) => Some((swap - limit).to_string()),
        (Some(swap @ 1..), None) => {
            let limit = now("memory.max").trim().parse().unwrap_or(swap);
            Some(swap.saturating_sub(limit).max(0).to_string())
        }
        (Some(_), _) | (None, Some(-1)) => Some("max".to_owned()),
        (None, _) => None,
    };
    if let Some(swap) = swap {
        set("memory.swap.max", swap);
    }
    if let Some(limit) = limit {
        set("memory.max", or_max(limit));
    }
    if let Some(reservation) = reservation {
        set("memory.low", or_max(reservation));
    }
    Ok(())
}

fn or_max(value: i64) -> String {
    match value {
        0.. => value.to_string(),
        _ => "max".to_owned(),
    }
}

/// As libcontainer sets it at creation: 0 would let nobody in, and is taken for 1.
fn pids(limits: &LinuxPids) -> String {
    or_max(if limits.limit() == 0 {
        1
    } else {
        limits.limit()
    })
}

/// Files of cgroup v2 by their names: none of them leads out of the directory or moves processes.
fn unified(files: &HashMap<String, String>, changes: &mut Vec<Change>) -> Result<(), Error> {
    let mut files: Vec<_> = files.iter().collect();
    files.sort_unstable();
    for (name, value) in files {
        if name.contains('/') || name.starts_with("cgroup.") || !name.contains('.') {
            let reason = format!("{name:?} is no limit; expected a name such as \"memory.high\"");
            return Err(Error::invalid("linux.resources.unified", reason));
        }
        changes.push((name.clone(), value.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    /// `name=value` of each change, for a cgroup as the kernel makes it.
    fn changes(json: &str) -> Result<Vec<String>, String> {
        let now = |name: &str| match name {
            "cpu.max" => "50000 100000\n".to_owned(),
            "memory.max" => "1000\n".to_owned(),
            "memory.current" => "600\n".to_owned(),
            _ => String::new(),
        };
        let planned = plan(&resources(json), now).map_err(|error| error.to_string())?;
        Ok(planned
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect())
    }

    #[test]
    fn what_is_left_out_stays() {
        assert_eq!(changes("{}").unwrap(), [""; 0]);
        let zeros = r#"{"cpu":{"shares":0,"quota":0,"period":0},"memory":{"limit":0,"swap":0}}"#;
        assert_eq!(changes(zeros).unwrap(), [""; 0]);
        assert_eq!(
            changes(r#"{"cpu":{"quota":20000}}"#).unwrap(),
            ["cpu.max=20000 100000"]
        );
        assert_eq!(
            changes(r#"{"cpu":{"period":10000}}"#).unwrap(),
            ["cpu.max=50000 10000"]
        );
        assert_eq!(
            changes(r#"{"cpu":{"quota":-1}}"#).unwrap(),
            ["cpu.max=max 100000"]
        );
    }

    #[test]
    fn shares_become_weights() {
        let weights = [2, 512, 1024, 2048, 262_144].map(weight);
        assert_eq!(
            weights,
            [Some(1), Some(59), Some(100), Some(174), Some(10_000)]
        );
    }

    #[test]
    fn memory_and_swap_are_told_apart() {
        let both = r#"{"memory":{"limit":400,"swap":700,"reservation":100}}"#;
        assert_eq!(
            changes(both).unwrap(),
            ["memory.swap.max=300", "memory.max=400", "memory.low=100"]
        );
        let none = r#"{"memory":{"limit":-1}}"#;
        assert_eq!(
            changes(none).unwrap(),
            ["memory.swap.max=max", "memory.max=max"]
        );
        assert_eq!(
            changes(r#"{"memory":{"swap":1500}}"#).unwrap(),
            ["memory.swap.max=500"]
        );
        let error = changes(r#"{"memory":{"limit":400,"swap":300}}"#).unwrap_err();
        assert!(error.contains("swap is 300"), "{error}");
        let error = changes(r#"{"memory":{"limit":-7}}"#).unwrap_err();
        assert!(error.contains("limit is -7"), "{error}");
        let error = changes(r#"{"memory":{"limit":500,"checkBeforeUpdate":true}}"#).unwrap_err();
        assert!(error.contains("500") && error.contains("600"), "{error}");
    }

    #[test]
    fn pids_and_files_by_name() {
        let json = r#"{"pids":{"limit":0},"unified":{"memory.high":"5","cpu.weight":"7"}}"#;
        assert_eq!(
            changes(json).unwrap(),
            ["pids.max=1", "cpu.weight=7", "memory.high=5"]
        );
        assert_eq!(
            changes(r#"{"pids":{"limit":-1}}"#).unwrap(),
            ["pids.max=max"]
        );
        for name in ["../memory.max", "cgroup.procs", "tasks", ""] {
            let json = format!(r#"{{"unified":{{{name:?}:"1"}}}}"#);
            assert!(
                changes(&json).unwrap_err().contains("is no limit"),
                "{name}"
            );
        }
    }

    #[test]
    fn all_or_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        fs::write(directory.path().join("memory.max"), "max").unwrap();
        // A directory can't be written to, as a limit that the kernel refuses can't.
        fs::create_dir(directory.path().join("pids.max")).unwrap();
        let both = resources(r#"{"memory":{"limit":400},"pids":{"limit":5}}"#);
        let error = apply(directory.path(), &both).unwrap_err().to_string();
        assert!(error.contains("pids.max = \"5\""), "{error}");
        assert_eq!(read("memory.max"), "max");
        apply(directory.path(), &resources(r#"{"memory":{"limit":400}}"#)).unwrap();
        assert_eq!(read("memory.max"), "400");
    }
}
