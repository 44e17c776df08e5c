//! Standard streams and terminals.

use serde_json::json;
use supermachine_protocol::ResizePtyRequest;

use crate::harness::*;

pub(crate) const ALL: &[Case] = &[
    ("output_and_exit_code", output_and_exit_code),
    ("stderr_is_apart", stderr_is_apart),
    ("stdin_until_its_end", stdin_until_its_end),
    ("close_stdin_call", close_stdin_call),
    ("ten_megabytes", ten_megabytes),
    ("a_slow_reader_loses_nothing", a_slow_reader_loses_nothing),
    ("stdout_can_be_opened_by_name", stdout_can_be_opened_by_name),
    ("terminal", terminal),
    ("exec_terminal", exec_terminal),
];

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
