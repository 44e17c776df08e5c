//! What a VMM process has left when it takes its first request.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use libtest_mimic::{Completion, Failed, Trial};

use supermachine_vmm::control::{Preparation, SpawnConfig, VmHandle};
use supermachine_vmm::jail::{Layer, Missing, Policy};

use crate::support::{DEADLINE, Outcome, Vm, check, check_eq, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("confinement::no_privileges", no_privileges),
        test("confinement::limits", limits),
        layer("confinement::namespaces", namespaces),
        layer("confinement::network_beforehand", network_beforehand),
        layer("confinement::ids_of_its_own", ids_of_its_own),
        layer("confinement::empty_root", empty_root),
        layer("confinement::two_differ", two_differ),
        test("confinement::policy_is_checked", policy_is_checked),
        test("confinement::no_inherited_files", no_inherited_files),
        test("confinement::no_environment", no_environment),
        test("confinement::named_in_the_process_list", named),
        Trial::ignorable_test("confinement::in_its_cgroup", in_its_cgroup),
        test("confinement::joins_its_cgroups", joins_its_cgroups),
    ]
}

/// A test of layers that take privileges to raise.
fn layer(name: &str, run: fn() -> Outcome) -> Trial {
    Trial::ignorable_test(name, move || {
        if !rustix::process::geteuid().is_root() {
            return Ok(Completion::ignored_with("only as root"));
        }
        run().map(|()| Completion::Completed)
    })
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

fn namespaces() -> Outcome {
    let vm = Vm::spawn("namespaces")?;
    check_eq(vm.handle.missing_layers().to_vec(), expected_missing(&vm))?;
    let missing = |layer| {
        let mut all = vm.handle.missing_layers().iter();
        all.any(|missing| missing.layer == layer)
    };
    for (name, layer) in [
        ("user", Layer::UserNamespace),
        ("pid", Layer::Pid),
        ("mnt", Layer::Root),
        ("net", Layer::Network),
        ("ipc", Layer::Ipc),
        ("uts", Layer::Ipc),
        ("cgroup", Layer::Ipc),
    ] {
        let of = |pid: String| fs::read_link(format!("/proc/{pid}/ns/{name}"));
        let shared = of(vm.handle.pid().to_string())? == of("self".to_owned())?;
        check(
            shared == missing(layer),
            format!("{name}: shared is {shared}"),
        )?;
    }
    // It is the first process of its pid namespace.
    let pids = status_field(vm.handle.pid(), "NSpid")?;
    check_eq(pids.split_whitespace().last(), Some("1"))
}

/// One that was prepared is confined like any other, and its parent stays where it is.
fn network_beforehand() -> Outcome {
    let network = |of: String| fs::read_link(format!("/proc/{of}/ns/net"));
    let ours = network("self".to_owned())?;
    let (first, mut second) = (Preparation::begin(), Preparation::begin());
    second.wait();
    let first = Vm::spawn_prepared("first", Some(first))?;
    let second = Vm::spawn_prepared("second", Some(second))?;
    let of = |vm: &Vm| network(vm.handle.pid().to_string());
    check_eq(
        first.handle.missing_layers().to_vec(),
        expected_missing(&first),
    )?;
    check(of(&first)? != of(&second)?, "they share a network")?;
    check(
        ![of(&first)?, of(&second)?].contains(&ours),
        "one is in its parent's network",
    )?;
    let mut found = 0;
    for thread in fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        // Other tests' threads end meanwhile.
        let read = |name: &str| fs::read_to_string(thread.join(name)).unwrap_or_default();
        if read("comm").trim() != "vmm-control" {
            continue;
        }
        found += 1;
        check_eq(fs::read_link(thread.join("ns/net"))?, ours.clone())?;
    }
    check(
        found >= 2,
        format!("{found} threads watch over two processes"),
    )
}

/// Only these depend on the kernel's configuration.
fn expected_missing(vm: &Vm) -> Vec<Missing> {
    let mut missing = vm.handle.missing_layers().to_vec();
    missing.retain(|missing| matches!(missing.layer, Layer::UserNamespace | Layer::Landlock));
    missing
}

fn ids_of_its_own() -> Outcome {
    let vm = Vm::spawn("ids")?;
    let pid = vm.handle.pid();
    let id = (Policy::FIRST_ID + pid).to_string();
    for field in ["Uid", "Gid"] {
        let ids = status_field(pid, field)?;
        check_eq(ids.split_whitespace().collect(), vec![id.as_str(); 4])?;
    }
    check_eq(status_field(pid, "Groups")?.as_str(), "")
}

fn empty_root() -> Outcome {
    let vm = Vm::spawn("root")?;
    let root = format!("/proc/{}/root", vm.handle.pid());
    let entries: Vec<_> = fs::read_dir(&root)?.collect();
    check(entries.is_empty(), format!("found {entries:?}"))?;
    check(
        fs::write(format!("{root}/file"), "").is_err(),
        "the root can be written to",
    )?;
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", vm.handle.pid()))?;
    check_eq(mounts.lines().count(), 1)?;
    check(mounts.contains(" / / ro,nosuid,nodev,noexec"), mounts)
}

/// Two VMs share nothing with each other either.
fn two_differ() -> Outcome {
    let (one, other) = (Vm::spawn("one")?, Vm::spawn("other")?);
    for name in ["pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |vm: &Vm| fs::read_link(format!("/proc/{}/ns/{name}", vm.handle.pid()));
        check(of(&one)? != of(&other)?, format!("{name} is shared"))?;
    }
    let uid = |vm: &Vm| status_field(vm.handle.pid(), "Uid");
    check(uid(&one)? != uid(&other)?, "they share a user id")
}

/// A child without a pid namespace refuses to start unless it may, and then tells.
fn policy_is_checked() -> Outcome {
    let bare = |policy: &str| -> Result<String, Failed> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(DEADLINE))?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("supermachine-vmm")
            .args(["vmm", "policy", "warn", policy])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        let mut socket = &ours;
        let mut header = [0; 8];
        socket.read_exact(&mut header)?;
        let [a, b, c, d, ..] = header;
        let mut said = vec![0; u32::from_le_bytes([a, b, c, d]) as usize];
        socket.read_exact(&mut said)?;
        child.kill()?;
        child.wait()?;
        Ok(String::from_utf8(said)?)
    };
    let strict = bare(r#"{"jail":{"allow_missing":[],"first_id":1879048192}}"#)?;
    check(
        strict.contains("fault") && strict.contains("lacks layer"),
        strict,
    )?;
    let all: Vec<_> = Layer::ALL
        .iter()
        .map(|layer| format!("{:?}", layer.as_str()))
        .collect();
    let all = all.join(",");
    let lenient = bare(&format!(
        r#"{{"jail":{{"allow_missing":[{all}],"first_id":1879048192}}}}"#
    ))?;
    check(
        lenient.contains("hello") && lenient.contains(r#"{"layer":"pid","reason":"#),
        lenient,
    )?;
    let wrong = bare(r#"{"jail":{"allow_missing":["moat"],"first_id":1}}"#)?;
    check(wrong.contains("unknown variant `moat`"), wrong)
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
            let link = link.to_string_lossy();
            // What it opened itself, before it was confined.
            matches!(&*link, "/dev/null" | "/dev/kvm" | "anon_inode:[io_uring]")
                // On some processors a VM was the way to ask what the host's KVM is.
                || link.starts_with("anon_inode:kvm-")
                || link.starts_with("socket:")
                || link.starts_with("pipe:")
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
    let expected = "supermachine-vmm\0vmm\0some-name\0warn\0";
    check(cmdline.starts_with(expected), cmdline)
}

fn in_its_cgroup() -> Result<Completion, Failed> {
    let name = format!("supermachine-tests-{}", std::process::id());
    let cgroup = Path::new("/sys/fs/cgroup").join(&name);
    if !Path::new("/sys/fs/cgroup/cgroup.procs").exists() || fs::create_dir(&cgroup).is_err() {
        return Ok(Completion::ignored_with(
            "no cgroup v2 that it may make one in",
        ));
    }
    let mut config = SpawnConfig::new("cgroup");
    config.cgroups = vec![cgroup.clone()];
    let found = VmHandle::spawn(config, Box::new(|_| {}))
        .map(|vm| fs::read_to_string(format!("/proc/{}/cgroup", vm.pid())));
    fs::remove_dir(&cgroup)?;
    check_eq(found??, format!("0::/{name}\n"))?;
    Ok(Completion::Completed)
}

/// Files stand in for cgroups, as not every host lets tests make some; one can't be written.
fn joins_its_cgroups() -> Outcome {
    for others in [vec![], vec!["/proc/self/status".into()]] {
        let cgroup = tempfile::tempdir()?;
        let mut config = SpawnConfig::new("cgroup");
        config.cgroups = others;
        config.cgroups.push(cgroup.path().to_owned());
        let vm = VmHandle::spawn(config, Box::new(|_| {}))?;
        let procs = fs::read_to_string(cgroup.path().join("cgroup.procs"))?;
        check_eq(procs, vm.pid().to_string())?;
    }
    Ok(())
}
