//! The tests themselves.

use nix::libc::{SIGKILL, SIGTERM};
use serde_json::json;
use supermachine_protocol::{FileContent, ResizePtyRequest, ttrpc};

use crate::changes;
use crate::harness::*;

pub(crate) const ALL: &[Case] = &[
    ("output_and_exit_code", output_and_exit_code),
    ("stderr_is_apart", stderr_is_apart),
    ("stdin_until_its_end", stdin_until_its_end),
    ("close_stdin_call", close_stdin_call),
    ("ten_megabytes", ten_megabytes),
    ("a_slow_reader_loses_nothing", a_slow_reader_loses_nothing),
    ("killed_by_signals", killed_by_signals),
    ("kill_all", kill_all),
    ("user_cwd_env_hostname", user_cwd_env_hostname),
    ("missing_cwd_is_created", missing_cwd_is_created),
    ("stdout_can_be_opened_by_name", stdout_can_be_opened_by_name),
    ("terminal", terminal),
    ("exec_many", exec_many),
    (
        "exec_has_its_own_user_cwd_env",
        exec_has_its_own_user_cwd_env,
    ),
    ("calls_are_filtered", calls_are_filtered),
    ("devices_are_restricted", devices_are_restricted),
    ("capabilities_of_every_kind", capabilities_of_every_kind),
    ("cwd_in_a_mount", cwd_in_a_mount),
    ("files_of_the_host", files_of_the_host),
    ("exec_terminal", exec_terminal),
    ("exec_left_behind", exec_left_behind),
    ("pids", pids),
    ("program_not_found", program_not_found),
    ("exec_not_found", exec_not_found),
    ("not_an_executable_format", not_an_executable_format),
    ("requests_that_cannot_be", requests_that_cannot_be),
    ("two_of_one_name", two_of_one_name),
    ("life_in_the_wrong_order", life_in_the_wrong_order),
    ("nothing_is_left", nothing_is_left),
    ("other_versions_are_refused", other_versions_are_refused),
    ("limits", limits),
    (
        "nothing_written_is_no_change",
        changes::nothing_written_is_no_change,
    ),
    ("changes_of_every_kind", changes::changes_of_every_kind),
    ("deletions_and_renames", changes::deletions_and_renames),
    (
        "nobody_is_told_of_a_running_container",
        changes::nobody_is_told_of_a_running_container,
    ),
];

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

fn output_and_exit_code() -> Outcome {
    on_machine(async |machine| {
        let (stdout, stderr, status) = machine.output("a", &spec(&sh("echo hello; exit 42"))).await;
        assert_eq!(
            (stdout.as_str(), stderr.as_str(), status),
            ("hello\n", "", 42)
        );
    })
}

fn stderr_is_apart() -> Outcome {
    on_machine(async |machine| {
        let (stdout, stderr, status) = machine
            .output("a", &spec(&sh("echo out; echo err >&2")))
            .await;
        assert_eq!(
            (stdout.as_str(), stderr.as_str(), status),
            ("out\n", "err\n", 0)
        );
    })
}

fn stdin_until_its_end() -> Outcome {
    on_machine(async |machine| {
        let mut ends = machine.run("a", &spec(&["cat"])).await;
        send(ends.stdin.as_ref().unwrap(), b"one\ntwo\n".to_vec()).await;
        drop(ends.stdin.take());
        assert_eq!(text(ends.stdout.take()).await, "one\ntwo\n");
        assert_eq!(machine.exit("a", "").await, 0);
    })
}

fn close_stdin_call() -> Outcome {
    on_machine(async |machine| {
        let mut ends = machine.run("a", &spec(&["cat"])).await;
        send(ends.stdin.as_ref().unwrap(), b"all of it".to_vec()).await;
        machine
            .client()
            .close_stdin(call(), &process_request("a", ""))
            .await
            .unwrap();
        assert_eq!(text(ends.stdout.take()).await, "all of it");
        assert_eq!(machine.exit("a", "").await, 0);
    })
}

/// Both ways, byte for byte.
fn ten_megabytes() -> Outcome {
    on_machine(async |machine| {
        let mut ends = machine.run("a", &spec(&["cat"])).await;
        let data: Vec<u8> = (0..10_u32 << 18)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        assert_eq!(data.len(), 10 << 20);
        let stdin = ends.stdin.take().unwrap();
        let sent = data.clone();
        let (_, got) = tokio::join!(
            async move {
                send(&stdin, sent).await;
                drop(stdin);
            },
            bytes(ends.stdout.take())
        );
        assert!(got == data, "{} bytes came back", got.len());
        assert_eq!(machine.exit("a", "").await, 0);
    })
}

fn a_slow_reader_loses_nothing() -> Outcome {
    on_machine(async |machine| {
        let script = "dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' x";
        let mut ends = machine.run("a", &spec(&sh(script))).await;
        // Far more than pipes and sockets hold was written before the first byte is read, and the
        // process has no way to exit until it is.
        let stdout = ends.stdout.take().unwrap();
        until(&stdout, "x").await;
        let rest = bytes(Some(stdout)).await;
        assert_eq!(rest.len(), (1 << 20) - 1);
        assert_eq!(machine.exit("a", "").await, 0);
    })
}

fn killed_by_signals() -> Outcome {
    on_machine(async |machine| {
        let script = "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 1; done";
        let ends = machine.run("a", &spec(&sh(script))).await;
        until(ends.stdout.as_ref().unwrap(), "ready").await;
        machine
            .signal("a", "", SIGTERM as u32, false)
            .await
            .unwrap();
        assert_eq!(machine.exit("a", "").await, 3);
        let (code, _) = code(machine.signal("a", "", SIGTERM as u32, false).await);
        assert_eq!(code, ttrpc::Code::NOT_FOUND);

        machine.run("b", &spec(&["sleep", "1000"])).await;
        machine
            .signal("b", "", SIGKILL as u32, false)
            .await
            .unwrap();
        assert_eq!(machine.exit("b", "").await, 128 + SIGKILL as u32);

        // A real-time signal, for which there is no name. (An init's own namespace shields it.)
        machine.run("c", &spec(&["sleep", "1000"])).await;
        machine
            .exec("c", "e", &process(&["sleep", "1000"]))
            .await
            .unwrap();
        machine.signal("c", "e", 40, false).await.unwrap();
        assert_eq!(machine.exit("c", "e").await, 168);
    })
}

fn kill_all() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        machine
            .exec("a", "e", &process(&["sleep", "1000"]))
            .await
            .unwrap();
        machine.signal("a", "", SIGKILL as u32, true).await.unwrap();
        assert_eq!(machine.exit("a", "e").await, 137);
        assert_eq!(machine.exit("a", "").await, 137);
    })
}

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

fn stdout_can_be_opened_by_name() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&sh("echo one > /dev/stdout; echo two > /dev/stderr"));
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (stdout, stderr, status) = machine.output("a", &spec).await;
        assert_eq!(
            (stdout.as_str(), stderr.as_str(), status),
            ("one\n", "two\n", 0)
        );
    })
}

fn resize(id: &str, exec_id: &str, columns: u32, rows: u32) -> ResizePtyRequest {
    let mut request = ResizePtyRequest::new();
    request.container_id = id.to_owned();
    request.exec_id = exec_id.to_owned();
    request.columns = columns;
    request.rows = rows;
    request
}

fn terminal() -> Outcome {
    on_machine(async |machine| {
        let mut spec = spec(&sh(
            "stty size; echo ready; read x; stty size; tty=$(ls /dev/pts); exit 5",
        ));
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"width": 81, "height": 25});
        let mut ends = machine.run("a", &spec).await;
        let first = until(ends.stdout.as_ref().unwrap(), "ready\r\n").await;
        assert!(first.contains("25 81"), "{first:?}");
        machine
            .client()
            .resize_pty(call(), &resize("a", "", 132, 50))
            .await
            .unwrap();
        send(ends.stdin.as_ref().unwrap(), b"x\n".to_vec()).await;
        let rest = text(ends.stdout.take()).await;
        assert!(rest.contains("50 132"), "{rest:?}");
        assert_eq!(machine.exit("a", "").await, 5);
    })
}

fn exec_many() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        for number in 0..20 {
            let name = format!("e{number}");
            let script = format!("echo {number}; exit {number}");
            let mut ends = machine
                .exec("a", &name, &process(&sh(&script)))
                .await
                .unwrap();
            assert_eq!(text(ends.stdout.take()).await, format!("{number}\n"));
            assert_eq!(machine.exit("a", &name).await, number);
            machine
                .client()
                .delete_process(call(), &process_request("a", &name))
                .await
                .unwrap();
        }
    })
}

fn exec_has_its_own_user_cwd_env() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        let mut process = process(&sh(
            "id -u; id -G; pwd; echo $A; hostname; grep CapEff /proc/self/status",
        ));
        process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [1000, 5]});
        process["cwd"] = json!("/etc");
        process["env"] = json!(["PATH=/bin", "A=exec"]);
        process["capabilities"] = json!({"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"]});
        let mut ends = machine.exec("a", "e", &process).await.unwrap();
        let stdout = text(ends.stdout.take()).await;
        assert_eq!(
            stdout,
            "1000\n1000 5\n/etc\nexec\nguest-container\nCapEff:\t0000000000000000\n"
        );
        assert_eq!(machine.exit("a", "e").await, 0);
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

fn exec_terminal() -> Outcome {
    on_machine(async |machine| {
        let id = "a".repeat(64);
        machine.run(&id, &spec(&["sleep", "1000"])).await;
        let mut process = process(&sh("stty size; echo by name > /dev/stdout; id -u; exit 4"));
        process["terminal"] = json!(true);
        process["consoleSize"] = json!({"width": 90, "height": 30});
        process["user"] = json!({"uid": 1000, "gid": 1000});
        // Names as long as Docker's.
        let exec = "e".repeat(64);
        let mut ends = machine.exec(&id, &exec, &process).await.unwrap();
        let stdout = text(ends.stdout.take()).await;
        assert_eq!(stdout, "30 90\r\nby name\r\n1000\r\n");
        assert_eq!(machine.exit(&id, &exec).await, 4);
    })
}

/// A process that an exec leaves behind keeps its output only for a while.
fn exec_left_behind() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        let mut ends = machine
            .exec("a", "e", &process(&sh("sleep 1000 & echo gone")))
            .await
            .unwrap();
        assert_eq!(machine.exit("a", "e").await, 0);
        assert_eq!(text(ends.stdout.take()).await, "gone\n");
    })
}

fn pids() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        machine
            .exec("a", "e", &process(&["sleep", "1000"]))
            .await
            .unwrap();
        let response = machine
            .client()
            .list_pids(call(), &container("a"))
            .await
            .unwrap();
        assert_eq!(response.pids.len(), 2, "{:?}", response.pids);
    })
}

fn program_not_found() -> Outcome {
    on_machine(async |machine| {
        for (program, expected) in [
            (
                "nosuch",
                "exec: \"nosuch\": executable file not found in $PATH",
            ),
            (
                "/nosuch",
                "exec: \"/nosuch\": stat /nosuch: no such file or directory",
            ),
            ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ] {
            let ends = machine.ports(false);
            let (code, text) = code(machine.create("a", &spec(&[program]), &ends).await);
            assert_eq!((code, text.as_str()), (ttrpc::Code::UNKNOWN, expected));
        }
        // And the name is free again.
        assert_eq!(machine.output("a", &spec(&["true"])).await.2, 0);
    })
}

fn exec_not_found() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        let (_, text) = code(
            machine
                .exec("a", "e", &process(&["nosuch"]))
                .await
                .map(drop),
        );
        assert_eq!(text, "exec: \"nosuch\": executable file not found in $PATH");
        machine.exec("a", "e", &process(&["true"])).await.unwrap();
        assert_eq!(machine.exit("a", "e").await, 0);
        let mut process = process(&["true"]);
        process["cwd"] = json!("/nosuch");
        let (_, text) = code(machine.exec("a", "f", &process).await.map(drop));
        let expected =
            "chdir to cwd (\"/nosuch\") set in config.json failed: no such file or directory";
        assert_eq!(text, expected);
    })
}

fn not_an_executable_format() -> Outcome {
    on_machine(async |machine| {
        let script =
            "echo nonsense > /tmp/x; touch /tmp/y; busybox chmod 755 /tmp/x; echo; sleep 1000";
        let ends = machine.run("a", &spec(&sh(script))).await;
        until(ends.stdout.as_ref().unwrap(), "\n").await;
        let (_, text) = code(
            machine
                .exec("a", "e", &process(&["/tmp/x"]))
                .await
                .map(drop),
        );
        assert_eq!(text, "exec /tmp/x: exec format error");
    })
}

fn requests_that_cannot_be() -> Outcome {
    on_machine(async |machine| {
        let invalid = ttrpc::Code::INVALID_ARGUMENT;
        let ends = machine.ports(false);
        let good = spec(&["true"]);
        assert_eq!(code(machine.create("../a", &good, &ends).await).0, invalid);
        assert_eq!(code(machine.create("", &good, &ends).await).0, invalid);
        assert_eq!(
            code(machine.create("a", &json!({"process": 1}), &ends).await).0,
            invalid
        );
        let mut request = machine.create_request("a", &good, &ends);
        request.rootfs = None.into();
        assert_eq!(
            code(machine.client().create_container(call(), &request).await).0,
            invalid
        );
        let mut request = machine.create_request("a", &good, &ends);
        request
            .rootfs
            .mut_or_insert_default()
            .mut_overlay()
            .lower_disks = vec!["absent".to_owned()];
        let (code_, text) = code(machine.client().create_container(call(), &request).await);
        assert_eq!(code_, ttrpc::Code::NOT_FOUND);
        assert!(text.contains("absent"), "{text}");
        let mut terminal = good.clone();
        terminal["process"]["terminal"] = json!(true);
        assert_eq!(code(machine.create("a", &terminal, &ends).await).0, invalid);
        let mut ends = machine.ports(false);
        ends.stdio.stdout_port = 999;
        assert_eq!(
            code(machine.create("a", &good, &ends).await).0,
            ttrpc::Code::NOT_FOUND
        );
        assert_eq!(machine.output("a", &good).await.2, 0);
    })
}

fn two_of_one_name() -> Outcome {
    on_machine(async |machine| {
        machine.run("a", &spec(&["sleep", "1000"])).await;
        let ends = machine.ports(false);
        let exists = ttrpc::Code::ALREADY_EXISTS;
        assert_eq!(
            code(machine.create("a", &spec(&["true"]), &ends).await).0,
            exists
        );
        machine
            .exec("a", "e", &process(&["sleep", "1000"]))
            .await
            .unwrap();
        assert_eq!(
            code(machine.exec("a", "e", &process(&["true"])).await.map(drop)).0,
            exists
        );
    })
}

fn life_in_the_wrong_order() -> Outcome {
    on_machine(async |machine| {
        let wrong = ttrpc::Code::FAILED_PRECONDITION;
        let ends = machine.ports(false);
        machine
            .create("a", &spec(&["sleep", "1000"]), &ends)
            .await
            .unwrap();
        assert_eq!(
            code(machine.exec("a", "e", &process(&["true"])).await.map(drop)).0,
            wrong
        );
        assert_eq!(code(machine.delete("a").await).0, wrong);
        machine.start_container("a").await.unwrap();
        assert_eq!(code(machine.start_container("a").await).0, wrong);
        assert_eq!(code(machine.delete("a").await).0, wrong);
        machine
            .signal("a", "", SIGKILL as u32, false)
            .await
            .unwrap();
        assert_eq!(machine.exit("a", "").await, 137);
        assert_eq!(
            code(machine.exec("a", "e", &process(&["true"])).await.map(drop)).0,
            wrong
        );
        machine.delete("a").await.unwrap();
        assert_eq!(code(machine.delete("a").await).0, ttrpc::Code::NOT_FOUND);

        // One that was never started can be killed and deleted.
        let ends = machine.ports(false);
        machine.create("b", &spec(&["true"]), &ends).await.unwrap();
        machine
            .signal("b", "", SIGKILL as u32, false)
            .await
            .unwrap();
        assert_eq!(machine.exit("b", "").await, 137);
        machine.delete("b").await.unwrap();
    })
}

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

fn nothing_is_left() -> Outcome {
    on_machine(async |machine| {
        let measure = || {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .lines()
                .count();
            (
                count("/proc/self/fd"),
                mounts,
                count("/sys/fs/cgroup/containers"),
            )
        };
        machine.output("a", &spec(&["true"])).await;
        let before = measure();
        for id in ["b", "c", "d"] {
            let mut ends = machine.run(id, &spec(&["sleep", "1000"])).await;
            ends.close_stdin();
            let mut terminal = process(&["true"]);
            terminal["terminal"] = json!(true);
            let exec = machine.exec(id, "e", &terminal).await.unwrap();
            assert_eq!(machine.exit(id, "e").await, 0);
            drop(exec);
            machine.signal(id, "", SIGKILL as u32, true).await.unwrap();
            assert!(text(ends.stdout.take()).await.is_empty());
            assert_eq!(machine.exit(id, "").await, 137);
            machine.delete(id).await.unwrap();
        }
        assert_eq!(measure(), before);
    })
}

fn other_versions_are_refused() -> Outcome {
    on_machine(async |machine| {
        let mut request = supermachine_protocol::ConnectRequest::new();
        request.protocol_version = supermachine_protocol::VERSION + 1;
        let mut stream = machine.client().connect(call(), &request).await.unwrap();
        let (code, text) = code(stream.recv().await.map(drop));
        assert!(text.contains("version"), "{text}");
        assert_ne!(code, ttrpc::Code::OK);
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
