//! What cannot be, and what is said of it.

use nix::libc::SIGKILL;
use serde_json::json;
use supermachine_protocol::ttrpc;

use crate::harness::*;

pub(crate) const ALL: &[Case] = &[
    ("program_not_found", program_not_found),
    ("exec_not_found", exec_not_found),
    ("not_an_executable_format", not_an_executable_format),
    ("requests_that_cannot_be", requests_that_cannot_be),
    ("two_of_one_name", two_of_one_name),
    ("life_in_the_wrong_order", life_in_the_wrong_order),
    ("other_versions_are_refused", other_versions_are_refused),
];

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
