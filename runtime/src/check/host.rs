//! The machine underneath: who runs this, processor, KVM, cgroups.

use std::path::Path;

use supermachine_vmm::hypervisor::{Host, Hypervisor};

use super::Line;
use crate::acquire::limits::{Kind, hierarchies};
use crate::config::Resolved;
use crate::virtualization::{self, Virtualization};

const LAB: &str = "use a host with virtualization, or run in the lab: cargo xtask lab run -- CMD";

pub(super) fn lines(config: &Resolved) -> Vec<Line> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let opened = Host::open().map(|_| ()).map_err(|error| chain(&error));
    let mut lines = vec![user()];
    // An arm64 processor says nothing of it.
    if cfg!(not(target_arch = "aarch64")) {
        lines.push(cpu(&virtualization::flags_of_host()));
    }
    lines.extend(kvm(
        opened,
        Virtualization::of_host(),
        config.vm.allow_emulated_kvm,
    ));
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

pub(super) fn cpu(flags: &str) -> Line {
    match virtualization::extension(flags) {
        Some(flag) => Line::ok("cpu", format!("has {flag}")),
        None => Line::warn(
            "cpu",
            "has neither svm nor vmx",
            "enable virtualization in the firmware, or nested virtualization of the machine this is",
        ),
    }
}

/// Whether /dev/kvm opens, and what kind of KVM is behind it.
pub(super) fn kvm(
    opened: Result<(), String>,
    kind: Virtualization,
    allow_emulated: bool,
) -> Vec<Line> {
    if let Err(error) = opened {
        return vec![Line::fail("/dev/kvm", error, LAB)];
    }
    let kind = match kind {
        Virtualization::Emulated(reason) if allow_emulated => Line::warn(
            "kvm kind",
            format!("emulating: {reason}"),
            "a guest takes minutes to boot; [vm] allow_emulated_kvm says to start it all the same",
        ),
        Virtualization::Emulated(reason) => {
            Line::fail("kvm kind", format!("emulating: {reason}"), LAB)
        }
        Virtualization::Nested => {
            Line::ok("kvm kind", "nested: this host is a virtual machine itself")
        }
        Virtualization::Native => Line::ok("kvm kind", "native"),
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
