mod every_key;
mod files;
mod roots;

use std::collections::BTreeMap;
use std::path::Path;

use expect_test::{expect, expect_file};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::request::{Mount, Stdio};

const CTR_2_1: &str = include_str!("testdata/ctr-2.1-plain.json");
const CTR_2_1_LIMITS: &str = include_str!("testdata/ctr-2.1-limits.json");
const CTR_1_7: &str = include_str!("testdata/ctr-1.7-plain.json");
const CTR_1_7_LIMITS: &str = include_str!("testdata/ctr-1.7-limits.json");

const FACTS: HostFacts = HostFacts {
    cpus: 8,
    memory: 16 << 30,
    upper_in_use: false,
    files: BTreeMap::new(),
    images: BTreeMap::new(),
};

fn overlay(layers: usize) -> Mount {
    let snapshots = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
    let lower: Vec<String> = (1..=layers)
        .rev()
        .map(|n| format!("{snapshots}/{n}/fs"))
        .collect();
    Mount {
        kind: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            "index=off".into(),
            format!("workdir={snapshots}/999/work"),
            format!("upperdir={snapshots}/999/fs"),
            format!("lowerdir={}", lower.join(":")),
        ],
        target: String::new(),
    }
}

fn bind(source: &str, mode: &str) -> Mount {
    Mount {
        kind: "bind".into(),
        source: source.into(),
        options: vec!["rbind".into(), mode.into()],
        target: String::new(),
    }
}

fn create(rootfs: Vec<Mount>, terminal: bool) -> Create {
    let stdio = Stdio::new("", "/run/fifo/out", "/run/fifo/err", terminal).expect("stdio");
    Create::new("default", "web-1", Path::new("/run/bundle"), rootfs, stdio).expect("create")
}

fn spec(text: &str) -> Spec {
    serde_json::from_str(text).expect("spec")
}

fn plan_of(text: &str, rootfs: Vec<Mount>) -> Result<Plan, Error> {
    plan(
        &create(rootfs, false),
        &spec(text),
        &FACTS,
        &Resolved::default(),
    )
}

fn pretty(plan: &Plan) -> String {
    format!("{:#}\n", plan.to_json().expect("serializable"))
}

/// The plain spec of ctr with the value at `pointer` replaced, objects made on the way.
fn altered(path: &[&str], value: Value) -> String {
    let mut spec: Value = serde_json::from_str(CTR_2_1).expect("spec");
    let mut place = &mut spec;
    for key in path {
        place = &mut place[*key];
    }
    *place = value;
    spec.to_string()
}

fn refusal(path: &[&str], value: Value) -> String {
    plan_of(&altered(path, value), vec![overlay(2)])
        .expect_err("should be refused")
        .to_string()
}

fn shape(resources: Value) -> (u32, u64) {
    let text = altered(&["linux", "resources"], resources);
    let plan = plan_of(&text, vec![overlay(1)]).expect("plan");
    (plan.vcpus, plan.memory >> 20)
}

#[test]
fn golden_plain() {
    let plan = plan_of(CTR_2_1, vec![overlay(2)]).expect("plan");
    expect_file!["testdata/ctr-2.1-plain.plan"].assert_eq(&pretty(&plan));
}

#[test]
fn golden_limits_terminal_read_only() {
    let spec = spec(CTR_2_1_LIMITS);
    let plan = plan(
        &create(vec![overlay(2)], true),
        &spec,
        &FACTS,
        &Resolved::default(),
    )
    .expect("plan");
    expect_file!["testdata/ctr-2.1-limits.plan"].assert_eq(&pretty(&plan));
}

#[test]
fn containerd_1_7_asks_for_the_same() {
    for (old, new) in [(CTR_1_7, CTR_2_1), (CTR_1_7_LIMITS, CTR_2_1_LIMITS)] {
        let mut old = plan_of(old, vec![overlay(2)]).expect("plan");
        let new = plan_of(new, vec![overlay(2)]).expect("plan");
        old.guest_spec.set_version(new.guest_spec.version().clone());
        assert_eq!(pretty(&old), pretty(&new));
    }
}

#[test]
fn nothing_of_the_spec_crates_defaults_reaches_the_guest() {
    let text = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
        "process":{"user":{"uid":7,"gid":8},"args":["x"],"cwd":"/"},
        "linux":{"namespaces":[{"type":"pid"},{"type":"ipc"}]}}"#;
    let plan = plan_of(text, vec![overlay(1)]).expect("plan");
    let guest = serde_json::to_value(&plan.guest_spec).expect("json");
    expect![[r#"
        {
          "linux": {
            "cgroupsPath": "/web-1",
            "namespaces": [
              {
                "type": "pid"
              },
              {
                "type": "ipc"
              },
              {
                "type": "mount"
              },
              {
                "type": "uts"
              }
            ],
            "resources": {}
          },
          "mounts": [],
          "ociVersion": "1.2.0",
          "process": {
            "args": [
              "x"
            ],
            "cwd": "/",
            "user": {
              "gid": 8,
              "uid": 7
            }
          },
          "root": {
            "path": "rootfs",
            "readonly": false
          }
        }"#]]
    .assert_eq(&format!("{guest:#}"));
}

#[test]
fn vcpus_and_memory_follow_the_limits() {
    assert_eq!(shape(json!({})), (1, 512));
    assert_eq!(
        shape(json!({"cpu": {"quota": 150_000, "period": 100_000}})),
        (2, 512)
    );
    assert_eq!(shape(json!({"cpu": {"quota": 150_000}})), (2, 512));
    assert_eq!(
        shape(json!({"cpu": {"quota": -1, "period": 100_000}})),
        (1, 512)
    );
    assert_eq!(shape(json!({"cpu": {"quota": 1, "period": 0}})), (1, 512));
    assert_eq!(shape(json!({"cpu": {"cpus": "0-2,5"}})), (4, 512));
    assert_eq!(
        shape(json!({"cpu": {"cpus": "0", "quota": 300_000, "period": 100_000}})),
        (1, 512)
    );
    assert_eq!(
        shape(json!({"cpu": {"quota": 9_000_000, "period": 100_000}})),
        (8, 512)
    );
    assert_eq!(
        shape(json!({"memory": {"limit": 256 << 20}})),
        (1, 256 + 96)
    );
    assert_eq!(
        shape(json!({"memory": {"limit": (256 << 20) + 1}})),
        (1, 256 + 97)
    );
    assert_eq!(shape(json!({"memory": {"limit": -1}})), (1, 512));
    assert_eq!(shape(json!({"memory": {"limit": i64::MAX}})), (1, 16 << 10));
    assert_eq!(shape(json!({"memory": {"limit": 4096}})), (1, 97));
}

#[test]
fn exact_limits_go_to_the_guests_cgroup() {
    let text = altered(
        &["linux", "resources"],
        json!({
            "cpu": {"quota": 150_000, "period": 100_000, "shares": 512, "cpus": "0-1"},
            "memory": {"limit": 268_435_456, "swap": 268_435_456, "swappiness": 10},
            "pids": {"limit": 64},
            "unified": {"memory.high": "200000000"},
        }),
    );
    let plan = plan_of(&text, vec![overlay(1)]).expect("plan");
    let guest = serde_json::to_value(&plan.guest_spec).expect("json");
    expect![[r#"
        {
          "cpu": {
            "period": 100000,
            "quota": 150000,
            "shares": 512
          },
          "memory": {
            "limit": 268435456,
            "swap": 268435456
          },
          "pids": {
            "limit": 64
          },
          "unified": {
            "memory.high": "200000000"
          }
        }"#]]
    .assert_eq(&format!("{:#}", guest["linux"]["resources"]));
    assert_eq!(plan.cpuset, "0-1");
    let left_out: Vec<&str> = plan.left_out.iter().map(|note| note.key.as_str()).collect();
    expect![[r#"
        linux.resources.memory.swappiness
        linux.resources.cpu.cpus
        linux.namespaces network"#]]
    .assert_eq(&left_out.join("\n"));
}

#[test]
fn labels_of_host_modules_are_left_out() {
    let mut value: Value = serde_json::from_str(CTR_2_1).expect("spec");
    value["process"]["apparmorProfile"] = json!("docker-default");
    value["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    value["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
    let plan = plan_of(&value.to_string(), vec![overlay(1)]).expect("plan");
    let guest = serde_json::to_string(&plan.guest_spec).expect("json");
    assert!(
        !guest.contains("docker-default") && !guest.contains("system_u"),
        "{guest}"
    );
    assert_eq!(plan.left_out.len(), 4, "{:?}", plan.left_out);
}

#[test]
fn host_namespaces_do_not_reach_the_guest() {
    let text = altered(
        &["linux", "namespaces"],
        json!([{"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": "/run/netns/x"}]),
    );
    let plan = plan_of(&text, vec![overlay(1)]).expect("plan");
    let guest = serde_json::to_string(&plan.guest_spec).expect("json");
    assert!(
        !guest.contains("/run/netns") && !guest.contains("network"),
        "{guest}"
    );
    assert!(guest.contains("mount") && guest.contains("uts"), "{guest}");
}

#[test]
fn what_a_machine_cannot_keep_is_refused_by_name() {
    let device = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
    let hook = json!({"createContainer": [{"path": "/usr/bin/cni"}]});
    let rules = [
        refusal(
            &["mounts"],
            json!([{"destination": "/data", "type": "bind", "source": "/srv",
            "options": ["rbind", "rw"]}]),
        ),
        refusal(
            &["mounts"],
            json!([{"destination": "/data", "type": "nfs", "source": "a:/b"}]),
        ),
        refusal(&["hooks"], hook),
        refusal(&["linux", "devices"], device),
        refusal(&["linux", "namespaces"], json!([{"type": "ipc"}])),
        refusal(
            &["linux", "namespaces"],
            json!([{"type": "pid", "path": "/proc/1/ns/pid"}]),
        ),
        refusal(&["linux", "namespaces"], json!([{"type": "user"}])),
        refusal(&["linux", "intelRdt"], json!({"closID": "a"})),
        refusal(
            &["linux", "resources", "blockIO"],
            json!({"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}),
        ),
        refusal(
            &["linux", "resources", "cpu"],
            json!({"realtimeRuntime": 1000}),
        ),
        refusal(
            &["linux", "seccomp"],
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock"}),
        ),
        refusal(
            &["linux", "seccomp"],
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        ),
        refusal(&["process", "execCPUAffinity"], json!({"initial": "0"})),
        refusal(&["linux", "sysctl"], json!({"vm.swappiness": "1"})),
        refusal(&["linux", "sysctl"], json!({"kernel.hostname": "x"})),
        refusal(&["linux", "sysctl"], json!({"net/../../x": "1"})),
    ];
    expect![[r#"
        The mount at /data is not supported in a microVM: the host's /srv cannot be shared with the guest yet
        The mount at /data is not supported in a microVM: the guest has no file system of type "nfs"
        hooks.createContainer is not supported in a microVM: it runs in the container's namespaces, which are the guest's, with a program of the host's
        The device /dev/kvm is not supported in a microVM: 10:232 is the host's and cannot be given to the guest
        A missing linux.namespaces pid is not supported in a microVM: without it the container would share the host's, which a machine cannot
        linux.namespaces pid is not supported in a microVM: /proc/1/ns/pid is the host's and cannot be joined
        linux.namespaces user is not supported in a microVM: not passed to the guest yet
        linux.intelRdt is not supported in a microVM: it is the host's to partition
        linux.resources.blockIO.throttleReadBpsDevice is not supported in a microVM: it names devices of the host
        linux.resources.cpu.realtimeRuntime is not supported in a microVM: cgroup v2 has no such limit
        linux.seccomp.listenerPath is not supported in a microVM: the listener is a process of the host's
        linux.seccomp SCMP_ACT_NOTIFY is not supported in a microVM: the listener is a process of the host's
        process.execCPUAffinity is not supported in a microVM: it numbers the host's processors, the machine has its own
        linux.sysctl vm.swappiness is not supported in a microVM: it is not in a separate kernel namespace
        linux.sysctl kernel.hostname is not supported in a microVM: it conflicts with hostname
        linux.sysctl net/../../x is not supported in a microVM: it is not in a separate kernel namespace"#]].assert_eq(&rules.join("\n"));
}

#[test]
fn what_is_wrong_is_named() {
    let wrong = [
        refusal(&["process"], Value::Null),
        refusal(&["process", "args"], json!([])),
        refusal(&["process", "cwd"], json!("tmp")),
        refusal(&["root"], Value::Null),
        refusal(&["ociVersion"], json!("2.0.0")),
        refusal(&["linux", "resources", "cpu"], json!({"cpus": "3-1"})),
        refusal(&["linux", "cgroupsPath"], json!("/a/../../b")),
        refusal(&["linux", "cgroupsPath"], json!("a:b")),
        refusal(&["process", "user", "umask"], json!(0o1000)),
        refusal(&["linux", "rootfsPropagation"], json!("sideways")),
        refusal(
            &["linux", "resources", "unified"],
            json!({"../x/memory.max": "1"}),
        ),
        refusal(&["hooks"], json!({"poststop": [{"path": "cni"}]})),
        refusal(
            &["hooks"],
            json!({"prestart": [{"path": "/cni", "timeout": 0}]}),
        ),
    ];
    expect![[r#"
        process is missing from the container's configuration
        process.args is missing from the container's configuration
        process.cwd is "tmp"; expected an absolute path
        root is missing from the container's configuration
        ociVersion is "2.0.0"; expected 1.x
        linux.resources.cpu.cpus is "3-1"; expected a list of processors such as "0-3,8"
        linux.cgroupsPath is "/a/../../b"; expected a path below the cgroup root without "..", or slice:prefix:name
        linux.cgroupsPath is "a:b"; expected a path below the cgroup root without "..", or slice:prefix:name
        process.user.umask is "0o1000"; expected 0 to 0o777
        linux.rootfsPropagation is "sideways"; expected private, shared, slave or unbindable
        linux.resources.unified is "../x/memory.max"; expected a file of cgroup v2 such as "memory.high"
        hooks.poststop[0].path is "cni"; expected an absolute path
        hooks.prestart[0].timeout is "0"; expected a number of seconds above 0"#]].assert_eq(&wrong.join("\n"));
}

#[test]
fn devices_every_kernel_has_are_allowed() {
    let tun = json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200}]);
    let plan = plan_of(&altered(&["linux", "devices"], tun), vec![overlay(1)]).expect("plan");
    let linux = plan.guest_spec.linux().as_ref().expect("linux");
    assert_eq!(linux.devices().as_ref().map(Vec::len), Some(1));
}

#[test]
fn systemd_cgroups_become_their_directories() {
    let path = |text: &str| {
        let text = altered(&["linux", "cgroupsPath"], json!(text));
        plan_of(&text, vec![overlay(1)]).expect("plan").cgroup
    };
    assert_eq!(path("/default/web"), Some("default/web".into()));
    assert_eq!(
        path("kubepods-pod1.slice:cri:abc"),
        Some("kubepods.slice/kubepods-pod1.slice/cri-abc.scope".into())
    );
    assert_eq!(
        path("system.slice:docker:abc"),
        Some("system.slice/docker-abc.scope".into())
    );
    assert_eq!(path(""), None);
}

proptest! {
    #[test]
    fn no_text_of_a_limit_panics(cpus in "[0-9,\\- ]{0,20}", quota: i64, period: u64, limit: i64) {
        let text = altered(&["linux", "resources"], json!({
            "cpu": {"cpus": cpus, "quota": quota, "period": period},
            "memory": {"limit": limit},
        }));
        if let Ok(plan) = plan_of(&text, vec![overlay(1)]) {
            prop_assert!((1..=FACTS.cpus).contains(&plan.vcpus));
            prop_assert!((64 << 20..=FACTS.memory).contains(&plan.memory));
        }
    }
}
