//! What a VMM process has left when it takes its first request.

use std::fs;
use std::os::fd::AsRawFd;

use libtest_mimic::{Failed, Trial};

use crate::support::{Outcome, Vm, check, check_eq, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("confinement::no_privileges", no_privileges),
        test("confinement::limits", limits),
        test("confinement::no_inherited_files", no_inherited_files),
        test("confinement::no_environment", no_environment),
        test("confinement::named_in_the_process_list", named),
        test("confinement::joins_its_cgroup", joins_its_cgroup),
    ]
}

fn status_field(pid: u32, field: &str) -> Result<String, Failed> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
        .ok_or_else(|| format!("no field {field} in\n{status}").into())
}

fn no_privileges() -> Outcome {
    let vm = Vm::spawn("privileges")?;
    let pid = vm.handle.pid();
    check_eq(status_field(pid, "NoNewPrivs")?.as_str(), "1")?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        check_eq(status_field(pid, set)?.as_str(), "0000000000000000")?;
    }
    // Only who may drop from the bounding set has an empty one.
    let ours = status_field(std::process::id(), "CapEff")?;
    let setpcap = u64::from_str_radix(&ours, 16)? & (1 << 8) != 0;
    if setpcap {
        check_eq(status_field(pid, "CapBnd")?.as_str(), "0000000000000000")?;
    }
    Ok(())
}

fn limits() -> Outcome {
    let vm = Vm::spawn("limits")?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", vm.handle.pid()))?;
    let limit = |name: &str| {
        limits
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>())
            .unwrap_or_default()
    };
    check_eq(limit("Max core file size"), vec!["0", "0"])?;
    let files: u64 = limit("Max open files")
        .first()
        .ok_or("no limit of files")?
        .parse()?;
    check(files <= 4096, format!("{files} files allowed"))
}

fn no_inherited_files() -> Outcome {
    let secret = tempfile::NamedTempFile::new()?;
    // Without close-on-exec, as a careless program would have it.
    let leaked = rustix::io::dup(secret.as_file())?;
    let flags = rustix::io::fcntl_getfd(&leaked)?;
    check(flags.is_empty(), "the file would close by itself")?;
    let vm = Vm::spawn("files")?;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", vm.handle.pid()))? {
        found.push(fs::read_link(entry?.path())?);
    }
    check(leaked.as_raw_fd() >= 3, "the file is a standard stream")?;
    check(
        found.iter().all(|link| {
            link.as_os_str() == "/dev/null" || link.to_string_lossy().starts_with("socket:")
        }),
        format!("found {found:?}"),
    )
}

fn no_environment() -> Outcome {
    let vm = Vm::spawn("environment")?;
    let environ = fs::read(format!("/proc/{}/environ", vm.handle.pid()))?;
    check(
        environ.iter().all(|byte| *byte == 0),
        format!("found {}", String::from_utf8_lossy(&environ)),
    )
}

fn named() -> Outcome {
    let vm = Vm::spawn("some-name")?;
    let cmdline = fs::read_to_string(format!("/proc/{}/cmdline", vm.handle.pid()))?;
    check_eq(cmdline.as_str(), "supermachine-vmm\0vmm\0some-name\0warn\0")
}

/// A file stands in for `cgroup.procs`, as not every host lets tests make cgroups.
fn joins_its_cgroup() -> Outcome {
    let procs = tempfile::NamedTempFile::new()?;
    let mut config = supermachine_vmm::control::SpawnConfig::new("cgroup");
    config.cgroup_procs = Some(procs.path().to_owned());
    let vm = supermachine_vmm::control::VmHandle::spawn(config, Box::new(|_| {}))?;
    check_eq(fs::read_to_string(procs.path())?, vm.pid().to_string())
}
