//! The cases: what is changed of containerd's own configuration, and the processes in it.

use serde_json::{Value, json};

use super::compare::Allowed;

/// One container.
pub(super) struct Case {
    pub(super) name: &'static str,
    /// Merged into the configuration (RFC 7386).
    pub(super) patch: Value,
    pub(super) rows: Vec<Row>,
    /// Kernel parameters and files that the probe tells of.
    sysctls: &'static [&'static str],
    files: &'static [&'static str],
}

/// One process in it.
pub(super) struct Row {
    pub(super) name: &'static str,
    /// Merged into the container's process object.
    pub(super) patch: Value,
    /// The size of its terminal, columns first.
    pub(super) terminal: Option<(u16, u16)>,
    /// Where it may differ from runc's, and why.
    pub(super) allowed: &'static [Allowed],
}

fn row(name: &'static str, patch: Value) -> Row {
    Row {
        name,
        patch,
        terminal: None,
        allowed: &[],
    }
}

impl Case {
    /// The probe's command line.
    pub(super) fn probe(&self, more: &[&str]) -> Vec<String> {
        let mut words = vec!["/probe"];
        words.extend(more);
        for name in self.sysctls {
            words.extend(["--sysctl", name]);
        }
        for name in self.files {
            words.extend(["--file", name]);
        }
        words.into_iter().map(str::to_owned).collect()
    }
}

/// With the profile of system calls that containerd and Docker use, and a read-only root.
pub(super) fn everything_set() -> Case {
    let patch = json!({
        "hostname": "a-name",
        "domainname": "a.domain",
        "annotations": {"org.example.key": "value"},
        "root": {"readonly": true},
        "process": {
            "oomScoreAdj": 250,
            "user": {"umask": 0o027, "additionalGids": [10, 20, 4_000_000_000_u32]},
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 1024},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                {"type": "RLIMIT_STACK", "soft": 4_194_304, "hard": 8_388_608},
                {"type": "RLIMIT_MEMLOCK", "soft": 65536, "hard": 65536},
            ],
            "env": ["PATH=/bin:/usr/bin", "SECOND=2", "SECOND=again", "EMPTY="],
            "cwd": "/made/on/the/way",
            "noNewPrivileges": true,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "scratch",
             "options": ["noatime", "mode=1777", "size=1m"]},
            {"destination": "/made/on/the/way", "type": "tmpfs", "source": "tmpfs",
             "options": ["ro", "nosuid", "nodev", "noexec", "relatime"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"},
            ],
            "devices": [
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
                 "fileMode": 0o640, "uid": 7, "gid": 8},
            ],
            "sysctl": {
                "kernel.shm_rmid_forced": "1",
                "kernel.msgmax": "4096",
                "fs.mqueue.msg_max": "12",
                "net.ipv4.ip_unprivileged_port_start": "0",
                "net.ipv4.ping_group_range": "0 2147483647",
            },
            "resources": {
                "memory": {"limit": 134_217_728, "reservation": 67_108_864, "swap": 134_217_728},
                "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "burst": 20_000},
                "pids": {"limit": 77},
                "unified": {"memory.high": "120000512", "memory.min": "4096"},
            },
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
                "/sys/devices/virtual/powercap", "/no/such/path", "/etc/passwd",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
                "/dev/shm", "/no/such/path",
            ],
        },
    });
    let everything = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_MKNOD"]);
    let rows = vec![
        row("the container's own process", json!({})),
        Row {
            allowed: &[
                (&["umask"], "runc takes the container's for an exec"),
                (
                    &["status", "Umask"],
                    "runc takes the container's for an exec",
                ),
            ],
            ..row(
                "another user",
                json!({
                    "user": {"uid": 1000, "gid": 1001, "umask": 0o077, "additionalGids": [1002]},
                    "cwd": "/tmp",
                }),
            )
        },
        row(
            "another user with ambient capabilities",
            json!({
                "user": {"uid": 1000, "gid": 1001, "additionalGids": null},
                "cwd": "/tmp",
                "capabilities": {"bounding": everything, "permitted": everything,
                                 "effective": ["CAP_CHOWN", "CAP_KILL"],
                                 "inheritable": ["CAP_CHOWN", "CAP_KILL"], "ambient": ["CAP_CHOWN"]},
            }),
        ),
        row(
            "no capabilities at all",
            json!({
                "capabilities": {"bounding": [], "permitted": [], "effective": []},
            }),
        ),
        row(
            "one that may gain privileges",
            json!({"noNewPrivileges": false, "cwd": "/tmp"}),
        ),
        row(
            "one that may gain privileges, of another user",
            json!({
                "noNewPrivileges": null, "user": {"uid": 1000, "gid": 1001}, "cwd": "/tmp",
            }),
        ),
        Row {
            allowed: &[(&["oom_score_adj"], "runc takes the container's for an exec")],
            ..row(
                "limits, priorities, environment",
                json!({
                    "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
                                {"type": "RLIMIT_FSIZE", "soft": 1_000_000, "hard": 1_000_000}],
                    "oomScoreAdj": 777,
                    "env": ["PATH=/bin", "HOME=/elsewhere", "ONLY=this"],
                    "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
                    "scheduler": {"policy": "SCHED_BATCH", "nice": 5},
                    "cwd": "/",
                }),
            )
        },
        Row {
            terminal: Some((132, 43)),
            ..row(
                "a terminal",
                json!({
                    "terminal": true, "consoleSize": {"height": 43, "width": 132}, "cwd": "/",
                }),
            )
        },
    ];
    Case {
        name: "everything set",
        patch,
        rows,
        sysctls: &[
            "kernel.shm_rmid_forced",
            "kernel.msgmax",
            "fs.mqueue.msg_max",
            "net.ipv4.ip_unprivileged_port_start",
            "net.ipv4.ping_group_range",
        ],
        files: &[
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory.low",
            "/sys/fs/cgroup/memory.high",
            "/sys/fs/cgroup/memory.min",
            "/sys/fs/cgroup/memory.swap.max",
            "/sys/fs/cgroup/cpu.max",
            "/sys/fs/cgroup/cpu.max.burst",
            "/sys/fs/cgroup/cpu.weight",
            "/sys/fs/cgroup/pids.max",
            "/etc/passwd",
        ],
    }
}

/// Without filter and protected paths, with many capabilities, as an insider would run it.
pub(super) fn as_little_as_possible() -> Case {
    let many = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_SYS_ADMIN",
        "CAP_SYS_NICE",
        "CAP_SYS_RESOURCE",
        "CAP_SYS_PTRACE",
        "CAP_NET_ADMIN",
        "CAP_SYSLOG",
    ]);
    let patch = json!({
        "hostname": "insider",
        "root": {"readonly": null},
        "process": {
            "noNewPrivileges": null, "rlimits": null, "env": null,
            "user": {"additionalGids": null},
            "capabilities": {"bounding": many, "permitted": many, "effective": many},
            "scheduler": {"policy": "SCHED_OTHER", "nice": 3},
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0},
        },
        "linux": {
            "seccomp": null,
            "maskedPaths": null,
            "readonlyPaths": null,
            "rootfsPropagation": "rshared",
            "personality": {"domain": "LINUX32"},
            "resources": {
                "devices": [
                    {"allow": true, "access": "rwm"},
                    {"allow": false, "type": "c", "major": 1, "minor": 11, "access": "w"},
                ],
                "cpu": {"idle": 1},
            },
        },
    });
    let rows = vec![
        row("the container's own process", json!({})),
        row(
            "a filter without anything else",
            json!({"noNewPrivileges": true}),
        ),
        row(
            "a real-time scheduler",
            json!({
                "scheduler": {"policy": "SCHED_FIFO", "priority": 7},
                "ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 1},
            }),
        ),
        row(
            "a user without capabilities",
            json!({
                "user": {"uid": 65534, "gid": 65534}, "capabilities": null,
            }),
        ),
    ];
    Case {
        name: "as little as possible",
        patch,
        rows,
        sysctls: &[],
        files: &["/proc/sys/kernel/hostname"],
    }
}
