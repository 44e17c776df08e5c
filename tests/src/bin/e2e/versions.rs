//! What differs between containerds, and what one does to a running container when it is replaced.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use libtest_mimic::Trial;
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::{self, Ctr};
use supermachine_tests::host::{Host, unique};
use supermachine_tests::program::Program;
use supermachine_tests::{BUSYBOX, until};

use crate::leftovers::{kill_9, leaves_nothing};
use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("versions::containerd_restarted", restarted),
        world.vm_test("versions::bootstrap_by_protobuf", bootstrap_by_protobuf),
        world.vm_test("versions::info", info),
    ]
}

/// Killed, and ended in good order, under a running container; and absent when that ends.
fn restarted(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let mut containerd = Containerd::start(Path::new("containerd"), &[])?;
        let host = Host {
            ctr: Ctr::new("ctr", containerd.address()),
            containerd: None,
            ..world.host.clone()
        };
        host.ctr.import(&world.images.join("busybox.tar"))?;
        let container = host.container(BUSYBOX).with_streams().detach(&[
            "sh",
            "-c",
            "until [ -e /ready ]; do sleep 0.1; done; \
             echo first; while read line; do echo got $line; done",
        ])?;
        // Not before ctr has gone: it reads what is written while it is there.
        container.exec(&["touch", "/ready"])?.success()?;
        let id = container.id().to_owned();
        let task = host.task(&id)?.context("no task")?;

        containerd.crash()?;
        containerd.restart()?;
        equal(host.task(&id)?, Some(task.clone()))?;
        // What it wrote before is there, and it still hears and answers.
        let mut attached = Program::start(host.command(&["tasks", "attach", &id]), host.deadline)?;
        attached.expect("first\n")?;
        attached.write(b"one\n")?;
        attached.expect("got one\n")?;
        drop(attached);

        containerd.stop()?;
        containerd.restart()?;
        equal(host.task(&id)?, Some(task.clone()))?;
        let mut exec = container.start_exec(
            &[],
            &["sh", "-c", "echo ready; read line; echo $line; exit 3"],
        )?;
        exec.expect("ready\n")?;
        exec.write(b"two\n")?;
        let exec = exec.finish()?;
        equal(exec.text().as_str(), "ready\ntwo\n")?;
        equal(exec.code()?, 3)?;

        containerd.stop()?;
        kill_9(task.0)?;
        containerd.restart()?;
        until("the end to be known", host.deadline, || {
            Ok(host.status(&id)?.is_none_or(|status| status == "STOPPED"))
        })?;
        equal(container.end()?, 137)
    })
}

/// As containerd 2.3 and later start a shim: everything is on stdin, nothing on the command line.
fn bootstrap_by_protobuf(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let config = world.shim()?;
        let bundle = tempfile::tempdir()?;
        let (id, namespace) = (unique("boot"), "supermachine-tests");
        let run = |args: &[&str], input: Vec<u8>| {
            let mut command = Command::new(&config.program);
            command.args(args).current_dir(bundle.path());
            if let Some(config) = &config.config {
                command.env("SUPERMACHINE_CONFIG", config);
            }
            let output = ctr::collect(command, Some(input), config.deadline)?.success()?;
            // containerd reads both streams as the answer.
            equal(output.errors().as_str(), "")?;
            Ok::<_, anyhow::Error>(output.stdout)
        };
        let mut params = BootstrapParams::new();
        params.instance_id = id.clone();
        params.namespace = namespace.to_owned();
        params.containerd_grpc_address = "/run/nowhere/containerd.sock".to_owned();
        params.containerd_ttrpc_address = "/run/nowhere/containerd.sock.ttrpc".to_owned();
        params.containerd_binary = "containerd".to_owned();
        let said = run(&["start"], params.write_to_bytes()?)?;
        let result = BootstrapResult::parse_from_bytes(&said)?;
        equal((result.version, result.protocol.as_str()), (3, "ttrpc"))?;
        let again = run(&["start"], params.write_to_bytes()?);
        let again = again.err().context("two shims of one container")?;
        ensure!(
            format!("{again:#}").contains("already listens"),
            "does not name the reason: {again:#}"
        );
        answers_by_both_names(&result.address, &id)?;
        run(&["-namespace", namespace, "-id", &id, "delete"], Vec::new()).map(drop)
    })
}

/// Task v2 and v3, on one socket.
fn answers_by_both_names(address: &str, id: &str) -> Result<()> {
    let client = containerd_shim_protos::Client::connect(address)?;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut state = containerd_shim_protos::api::StateRequest::new();
        state.id = id.to_owned();
        let request = ttrpc::Request {
            service: service.to_owned(),
            method: "State".to_owned(),
            payload: state.write_to_bytes()?,
            ..Default::default()
        };
        match client.request(request) {
            Err(ttrpc::Error::RpcStatus(status)) => equal(status.code(), ttrpc::Code::NOT_FOUND)
                .with_context(|| format!("{service}: {}", status.message))?,
            other => anyhow::bail!("{service} answered {other:?}"),
        }
    }
    Ok(())
}

/// As containerd 2.2 and later ask before they prepare a root file system.
fn info(world: &World) -> Result<()> {
    let mut command = Command::new(world.shim()?.program);
    command.arg("-info");
    let said = ctr::collect(command, Some(Vec::new()), world.host.deadline)?.success()?;
    equal(said.errors().as_str(), "")?;
    let info = RuntimeInfo::parse_from_bytes(&said.stdout)?;
    let kinds = info
        .annotations
        .get("containerd.io/runtime-allow-mounts")
        .context("no mounts")?;
    for kind in ["erofs", "format/*", "mkdir/*"] {
        ensure!(
            kinds.split(',').any(|word| word == kind),
            "no {kind} in {kinds}"
        );
    }
    Ok(())
}
