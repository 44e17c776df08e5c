//! What a process of a container finds, and what it may do.

use serde_json::json;
use supermachine_protocol::FileContent;

use crate::harness::*;

pub(crate) const ALL: &[Case] = &[
    ("user_cwd_env_hostname", user_cwd_env_hostname),
    ("missing_cwd_is_created", missing_cwd_is_created),
    ("cwd_in_a_mount", cwd_in_a_mount),
    ("files_of_the_host", files_of_the_host),
    ("calls_are_filtered", calls_are_filtered),
    ("devices_are_restricted", devices_are_restricted),
    ("capabilities_of_every_kind", capabilities_of_every_kind),
    ("limits", limits),
];

fn user_cwd_env_hostname() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&sh(
            "id -u; id -g; id -G; pwd; echo $A; hostname; echo $HOME",
        ));
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [1001, 7, 8]});
        spec["process"]["cwd"] = json!("/tmp");
        spec["process"]["env"] = json!(["PATH=/bin", "A=b c"]);
        let (stdout, stderr, status) = machine.output("a", &spec).await;
        assert_eq!(
            stdout,
            "1000\n1001\n1001 7 8\n/tmp\nb c\nguest-container\n/home/user\n"
        );
        assert_eq!((stderr.as_str(), status), ("", 0));
    })
}

fn missing_cwd_is_created() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&["pwd"]);
        spec["process"]["cwd"] = json!("/not/there/yet");
        assert_eq!(machine.output("a", &spec).await.0, "/not/there/yet\n");
    })
}

fn cwd_in_a_mount() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&["pwd"]);
        spec["process"]["cwd"] = json!("/run/not/there/yet");
        assert_eq!(machine.output("a", &spec).await.0, "/run/not/there/yet\n");
        spec["process"]["cwd"] = json!("/etc/passwd");
        let ends = machine.ports(false);
        let (_, text) = code(machine.create("b", &spec, &ends).await);
        let expected = "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory";
        assert_eq!(text, expected);
    })
}

fn files_of_the_host() -> Outcome {
    on_machine(async |machine| {
        let file = |name: &str, content: &str, mode: u32| {
            let mut file = FileContent::new();
            file.name = name.to_owned();
            file.content = content.as_bytes().to_vec();
            file.mode = mode;
            file
        };
        let script = "cat /etc/hosts; echo more >> /etc/hosts; cat /etc/hosts; /sbin/new; \
                      touch /sbin/new 2>&1";
        let mut spec = spec(&sh(script));
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(
            json!({"destination": "/etc/hosts", "type": "bind", "source": "file-0",
            "options": ["rbind", "rprivate"]}),
        );
        mounts.push(
            json!({"destination": "/sbin/new", "type": "bind", "source": "file-1",
            "options": ["bind", "ro"]}),
        );
        let mut ends = machine.ports(false);
        let mut request = machine.create_request("a", &spec, &ends);
        request.files = vec![
            file("file-0", "127.0.0.1 localhost\n", 0o644),
            file("file-1", "#!/bin/sh\necho run\n", 0o755),
        ];
        let client = machine.client();
        client.create_container(call(), &request).await.unwrap();
        machine.start_container("a").await.unwrap();
        drop(ends.stdin.take());
        assert_eq!(
            text(ends.stdout).await,
            "127.0.0.1 localhost\n127.0.0.1 localhost\nmore\nrun\n\
             touch: /sbin/new: Read-only file system\n"
        );
        machine.exit("a", "").await;
        machine.delete("a").await.unwrap();

        // A source that did not come with the container.
        let ends = machine.ports(false);
        let (_, text) = code(machine.create("b", &spec, &ends).await);
        assert_eq!(text, "file \"file-0\" does not exist");
    })
}

/// The filter holds for every process, whether it may gain privileges or not, root or not.
fn calls_are_filtered() -> Outcome {
    on_machine(async |machine| {
        let script = "busybox mkdir /tmp/x; grep -E '^(Seccomp|NoNewPrivs|CapPrm):' \
            /proc/self/status; echo; sleep 1000";
        let mut spec = spec(&sh(script));
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
        });
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["capabilities"] = json!({"bounding": [], "permitted": [], "effective": []});
        let expected =
            |no_new| format!("NoNewPrivs:\t{no_new}\nSeccomp:\t2\nCapPrm:\t0000000000000000\n\n");
        let ends = machine.run("a", &spec).await;
        let told = until(ends.stdout.as_ref().unwrap(), "\n\n").await;
        assert_eq!(sorted(&told), sorted(&expected(0)));
        for (number, no_new, uid) in [
            (0, false, 0),
            (1, true, 0),
            (2, false, 1000),
            (3, true, 1000),
        ] {
            let script = script.replace("sleep 1000", "exit 3");
            let mut process = process(&sh(&script));
            process["noNewPrivileges"] = json!(no_new);
            process["capabilities"] = json!({});
            process["user"] = json!({"uid": uid, "gid": uid});
            let exec = format!("e{number}");
            let mut ends = machine.exec("a", &exec, &process).await.unwrap();
            let told = text(ends.stdout.take()).await;
            assert_eq!(
                sorted(&told),
                sorted(&expected(u8::from(no_new))),
                "{number}"
            );
            let errors = text(ends.stderr.take()).await;
            assert!(errors.contains("not supported"), "{errors}");
            assert_eq!(machine.exit("a", &exec).await, 3);
        }
    })
}

fn sorted(lines: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = lines.lines().collect();
    lines.sort_unstable();
    lines
}

fn devices_are_restricted() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&sh(
            "mknod /tmp/m c 1 1 && cat /tmp/m; mknod /tmp/z c 1 5 && head -c 3 /tmp/z | wc -c",
        ));
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"],
        });
        spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
        let (stdout, stderr, _) = machine.output("a", &spec).await;
        assert_eq!(stdout, "3\n", "{stderr}");
        assert!(stderr.contains("Operation not permitted"), "{stderr}");
    })
}

/// Sets that can't be reached by changing one after the other.
fn capabilities_of_every_kind() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&sh("grep ^Cap /proc/self/status"));
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_CHOWN"],
            "inheritable": ["CAP_CHOWN", "CAP_SYS_ADMIN"],
            "ambient": ["CAP_CHOWN", "CAP_SYS_ADMIN"],
        });
        let (stdout, stderr, _) = machine.output("a", &spec).await;
        let expected = "CapInh:\t0000000000200001\nCapPrm:\t0000000000000001\n\
            CapEff:\t0000000000000001\nCapBnd:\t0000000000200021\nCapAmb:\t0000000000000001\n";
        assert_eq!(stdout, expected, "{stderr}");
    })
}

fn limits() -> Outcome {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
    if !controllers.contains("memory") {
        return Outcome::Skipped("cgroup v2 has no memory controller here");
    }
    on_machine(async |machine| {
        let mut spec = spec(&sh(
            "busybox cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max",
        ));
        spec["linux"]["resources"] =
            json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 50}});
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "cgroup"}));
        spec["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}),
        );
        assert_eq!(machine.output("a", &spec).await.0, "67108864\n50\n");
    })
}
