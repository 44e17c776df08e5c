//! The machine underneath: who runs this, processor, KVM, cgroups.

use std::path::Path;

use supermachine_vmm::hypervisor::{Host, Hypervisor};

use super::Line;
use crate::acquire::limits::{Kind, hierarchies};

const LAB: &str = "use a host with virtualization, or run in the lab: cargo xtask lab run -- CMD";

pub(super) fn lines() -> Vec<Line> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let emulating_module = Path::new("/sys/module/kvm_pvm").exists();
    let opened = Host::open().map(|_| ()).map_err(|error| chain(&error));
    let mut lines = vec![user(), cpu(&cpuinfo)];
    lines.extend(kvm(opened, &cpuinfo, emulating_module));
    lines.push(cgroups(&mounts));
    lines
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn user() -> Line {
    let uid = rustix::process::geteuid().as_raw();
    match uid {
        0 => Line::ok("user", "root"),
        uid => Line::fail(
            "user",
            format!("uid {uid}"),
            "run this, and containerd, as root",
        ),
    }
}

/// The flags of the first processor.
fn flags(cpuinfo: &str) -> Vec<&str> {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().collect())
        .unwrap_or_default()
}

/// The flag of hardware virtualization, if there is one.
fn virtualization<'a>(flags: &[&'a str]) -> Option<&'a str> {
    flags
        .iter()
        .copied()
        .find(|flag| matches!(*flag, "svm" | "vmx"))
}

pub(super) fn cpu(cpuinfo: &str) -> Line {
    let flags = flags(cpuinfo);
    match virtualization(&flags) {
        Some(flag) => Line::ok("cpu", format!("has {flag}")),
        None => Line::warn(
            "cpu",
            "has neither svm nor vmx",
            "enable virtualization in the firmware, or nested virtualization of the machine this is",
        ),
    }
}

/// Whether /dev/kvm opens, and what kind of KVM is behind it.
pub(super) fn kvm(opened: Result<(), String>, cpuinfo: &str, emulating_module: bool) -> Vec<Line> {
    if let Err(error) = opened {
        return vec![Line::fail("/dev/kvm", error, LAB)];
    }
    let flags = flags(cpuinfo);
    let kind = match virtualization(&flags) {
        None => Line::fail(
            "kvm kind",
            "emulating: no hardware virtualization behind it, a guest kernel would take minutes",
            LAB,
        ),
        Some(_) if emulating_module => Line::fail(
            "kvm kind",
            "emulating: module kvm_pvm runs guests' kernels instruction by instruction",
            LAB,
        ),
        Some(_) if flags.contains(&"hypervisor") => {
            Line::ok("kvm kind", "nested: this host is a virtual machine itself")
        }
        Some(_) => Line::ok("kvm kind", "native"),
    };
    vec![Line::ok("/dev/kvm", "opens and has what is needed"), kind]
}

pub(super) fn cgroups(mountinfo: &str) -> Line {
    let hierarchies = hierarchies(mountinfo);
    let advice = "the machine's memory and CPU time are counted to the shim's cgroup instead";
    let Some(first) = hierarchies.first() else {
        return Line::warn("cgroups", "no hierarchy is mounted", advice);
    };
    let version = match first.kind {
        Kind::V2 => "v2".to_owned(),
        Kind::V1 | Kind::V1Cpuset => format!("v1, {} hierarchies", hierarchies.len()),
    };
    let writable = |root: &Path| rustix::fs::access(root, rustix::fs::Access::WRITE_OK).is_ok();
    match hierarchies
        .iter()
        .find(|hierarchy| !writable(&hierarchy.root))
    {
        Some(read_only) => {
            let found = format!("{version}; {} is read-only", read_only.root.display());
            Line::warn("cgroups", found, advice)
        }
        None => Line::ok("cgroups", version),
    }
}
