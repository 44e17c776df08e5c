//! Processes that come and go: execs, signals, and what is left of them.

use nix::libc::{SIGKILL, SIGTERM};
use serde_json::json;
use supermachine_protocol::ttrpc;

use crate::harness::*;

pub(crate) const ALL: &[Case] = &[
    ("killed_by_signals", killed_by_signals),
    ("kill_all", kill_all),
    ("exec_many", exec_many),
    (
        "exec_has_its_own_user_cwd_env",
        exec_has_its_own_user_cwd_env,
    ),
    ("exec_left_behind", exec_left_behind),
    ("pids", pids),
    ("nothing_is_left", nothing_is_left),
];

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
