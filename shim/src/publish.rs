//! Events on their way to containerd: one queue, one at a time, in order.
//!
//! They go over containerd's ttrpc socket; where that fails, by running the containerd binary,
//! which knows how to publish too. A containerd that is being restarted is waited for, a while.

use std::collections::VecDeque;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::types::mount::Mount;
use containerd_shim_protos::{api, topics};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField, MessageFull};
use supermachine_runtime::events::Event;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;
use ttrpc::context;

use crate::BoxError;
use crate::args::Args;
use crate::task::timestamp;

/// How long containerd may take for one event.
const FORWARD: Duration = Duration::from_secs(5);

/// Pauses before the second and later attempts to deliver an event.
const RETRIES: [Duration; 5] = [
    Duration::from_millis(20),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// Delivers a sandbox's events.
pub(crate) struct Publisher {
    namespace: String,
    address: String,
    ttrpc_address: String,
    binary: String,
    client: Option<EventsClient>,
}

impl Publisher {
    pub(crate) fn new(args: &Args) -> Self {
        Self {
            namespace: args.namespace.clone(),
            address: args.address.clone(),
            ttrpc_address: args.ttrpc_address.clone(),
            binary: args.publish_binary.clone(),
            client: None,
        }
    }

    /// Delivers until `closing` resolves; then what is in the queue, and no more.
    pub(crate) async fn run(
        mut self,
        mut queue: UnboundedReceiver<Event>,
        mut closing: oneshot::Receiver<()>,
    ) {
        loop {
            let event = tokio::select! {
                biased;
                event = queue.recv() => event,
                _ = &mut closing => None,
            };
            let Some(event) = event else { return };
            let (topic, event) = encode(&event);
            let mut envelope = Envelope::new();
            envelope.timestamp = Some(timestamp(SystemTime::now())).into();
            envelope.namespace.clone_from(&self.namespace);
            envelope.topic = topic.to_owned();
            envelope.event = Some(event).into();
            self.deliver(envelope).await;
        }
    }

    async fn deliver(&mut self, envelope: Envelope) {
        let mut pauses: VecDeque<_> = RETRIES.into();
        loop {
            let failed = match self.forward(&envelope).await {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::debug!(error = %failed, topic = envelope.topic, "could not forward an event");
            self.client = None;
            match self.run_binary(&envelope).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(%error, "could not publish an event by containerd"),
            }
            let Some(pause) = pauses.pop_front() else {
                tracing::warn!(error = %failed, topic = envelope.topic, "an event is lost");
                return;
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn forward(&mut self, envelope: &Envelope) -> Result<(), BoxError> {
        if self.ttrpc_address.is_empty() {
            return Err("containerd has no ttrpc address".into());
        }
        let client = match &self.client {
            Some(client) => client,
            None => {
                let path = self.ttrpc_address.trim_start_matches("unix://");
                let connection = Client::connect(&format!("unix://{path}")).await?;
                self.client.insert(EventsClient::new(connection))
            }
        };
        let mut request = api::ForwardRequest::new();
        request.envelope = MessageField::some(envelope.clone());
        client
            .forward(context::with_duration(FORWARD), &request)
            .await?;
        Ok(())
    }

    /// Has the containerd binary publish it over gRPC.
    async fn run_binary(&self, envelope: &Envelope) -> Result<(), BoxError> {
        if self.binary.is_empty() {
            return Err("no -publish-binary was given".into());
        }
        let mut child = tokio::process::Command::new(&self.binary)
            .args(["--address", &self.address, "publish"])
            .args(["--topic", &envelope.topic, "--namespace", &self.namespace])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let event = envelope.event.write_to_bytes()?;
        let run = async {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(&event).await?;
            }
            child.wait().await
        };
        let status = tokio::time::timeout(FORWARD, run).await??;
        if status.success() {
            Ok(())
        } else {
            Err(format!("{} publish: {status}", self.binary).into())
        }
    }
}

/// containerd's topic and message for an event.
fn encode(event: &Event) -> (&'static str, Any) {
    match event {
        Event::Created {
            container_id,
            bundle,
            rootfs,
            stdio,
            pid,
        } => {
            let mut io = task::TaskIO::new();
            io.stdin = stdio.stdin.to_string();
            io.stdout = stdio.stdout.to_string();
            io.stderr = stdio.stderr.to_string();
            io.terminal = stdio.terminal;
            let mut message = task::TaskCreate::new();
            message.container_id.clone_from(container_id);
            message.bundle = bundle.display().to_string();
            message.rootfs = rootfs
                .iter()
                .map(|mount| Mount {
                    type_: mount.kind.clone(),
                    source: mount.source.clone(),
                    target: mount.target.clone(),
                    options: mount.options.clone(),
                    ..Mount::new()
                })
                .collect();
            message.io = Some(io).into();
            message.pid = *pid;
            (topics::TASK_CREATE_EVENT_TOPIC, pack(&message))
        }
        Event::Started { container_id, pid } => {
            let mut message = task::TaskStart::new();
            message.container_id.clone_from(container_id);
            message.pid = *pid;
            (topics::TASK_START_EVENT_TOPIC, pack(&message))
        }
        Event::ExecAdded {
            container_id,
            exec_id,
        } => {
            let mut message = task::TaskExecAdded::new();
            message.container_id.clone_from(container_id);
            message.exec_id.clone_from(exec_id);
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, pack(&message))
        }
        Event::ExecStarted {
            container_id,
            exec_id,
            pid,
        } => {
            let mut message = task::TaskExecStarted::new();
            message.container_id.clone_from(container_id);
            message.exec_id.clone_from(exec_id);
            message.pid = *pid;
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, pack(&message))
        }
        Event::Exited {
            container_id,
            exec_id,
            pid,
            exit,
        } => {
            let mut message = task::TaskExit::new();
            message.container_id.clone_from(container_id);
            // The init process goes by its container's id here.
            let id = if exec_id.is_empty() {
                container_id
            } else {
                exec_id
            };
            message.id.clone_from(id);
            message.pid = *pid;
            message.exit_status = exit.status;
            message.exited_at = Some(timestamp(exit.at)).into();
            (topics::TASK_EXIT_EVENT_TOPIC, pack(&message))
        }
        Event::Deleted {
            container_id,
            pid,
            exit,
        } => {
            let mut message = task::TaskDelete::new();
            message.container_id.clone_from(container_id);
            message.id.clone_from(container_id);
            message.pid = *pid;
            message.exit_status = exit.status;
            message.exited_at = Some(timestamp(exit.at)).into();
            (topics::TASK_DELETE_EVENT_TOPIC, pack(&message))
        }
        Event::Paused { container_id } => {
            let mut message = task::TaskPaused::new();
            message.container_id.clone_from(container_id);
            (topics::TASK_PAUSED_EVENT_TOPIC, pack(&message))
        }
        Event::Resumed { container_id } => {
            let mut message = task::TaskResumed::new();
            message.container_id.clone_from(container_id);
            (topics::TASK_RESUMED_EVENT_TOPIC, pack(&message))
        }
        Event::OutOfMemory { container_id } => {
            let mut message = task::TaskOOM::new();
            message.container_id.clone_from(container_id);
            (topics::TASK_OOM_EVENT_TOPIC, pack(&message))
        }
    }
}

/// containerd names types in an `Any` by their bare full name.
pub(crate) fn pack<M: MessageFull>(message: &M) -> Any {
    let mut any = Any::new();
    any.type_url = M::descriptor().full_name().to_owned();
    // Writing to memory fails only for messages beyond 2 GiB.
    any.value = message.write_to_bytes().unwrap_or_default();
    any
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::sync::Arc;

    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use supermachine_runtime::events::Exit;
    use tokio::net::UnixListener;
    use tokio::sync::mpsc::{self, UnboundedSender};
    use ttrpc::asynchronous::transport::Listener;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// A containerd that hears events.
    struct Ear(UnboundedSender<Envelope>);

    #[async_trait]
    impl Events for Ear {
        async fn forward(
            &self,
            _: &TtrpcContext,
            req: api::ForwardRequest,
        ) -> ttrpc::Result<api::Empty> {
            let _ = self.0.send(req.envelope.unwrap_or_default());
            Ok(api::Empty::new())
        }
    }

    async fn listen(path: &Path, heard: UnboundedSender<Envelope>) -> Server {
        let _ = fs::remove_file(path);
        let listener = Listener::from(UnixListener::bind(path).unwrap());
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(create_events(Arc::new(Ear(heard))));
        server.start().await.unwrap();
        server
    }

    fn publisher(ttrpc_address: &Path, binary: &str) -> Publisher {
        Publisher {
            namespace: "default".to_owned(),
            address: "/c.sock".to_owned(),
            ttrpc_address: ttrpc_address.display().to_string(),
            binary: binary.to_owned(),
            client: None,
        }
    }

    fn started(id: &str) -> Event {
        Event::Started {
            container_id: id.to_owned(),
            pid: 7,
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_also_after_containerd_restarted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ttrpc");
        let (sender, mut heard) = mpsc::unbounded_channel();
        let mut server = listen(&path, sender.clone()).await;
        let (events, queue) = mpsc::unbounded_channel();
        let (close, closing) = oneshot::channel();
        let run = tokio::spawn(publisher(&path, "").run(queue, closing));
        events.send(started("a")).unwrap();
        let first = heard.recv().await.unwrap();
        assert_eq!(first.topic, topics::TASK_START_EVENT_TOPIC);
        assert_eq!(first.namespace, "default");
        assert_eq!(first.event.type_url, "containerd.events.TaskStart");

        server.shutdown().await.unwrap();
        events.send(started("b")).unwrap();
        events
            .send(Event::Exited {
                container_id: "b".to_owned(),
                exec_id: String::new(),
                pid: 7,
                exit: Exit {
                    status: 3,
                    at: SystemTime::now(),
                },
            })
            .unwrap();
        let _server = listen(&path, sender).await;
        assert_eq!(
            heard.recv().await.unwrap().topic,
            topics::TASK_START_EVENT_TOPIC
        );
        let exit = heard.recv().await.unwrap();
        assert_eq!(exit.topic, topics::TASK_EXIT_EVENT_TOPIC);
        let exit = task::TaskExit::parse_from_bytes(&exit.event.value).unwrap();
        assert_eq!((exit.id.as_str(), exit.exit_status), ("b", 3));

        close.send(()).unwrap();
        run.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_queued_at_the_end_is_delivered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ttrpc");
        let (sender, mut heard) = mpsc::unbounded_channel();
        let _server = listen(&path, sender).await;
        let (events, queue) = mpsc::unbounded_channel();
        let (close, closing) = oneshot::channel();
        for id in ["a", "b", "c"] {
            events.send(started(id)).unwrap();
        }
        close.send(()).unwrap();
        publisher(&path, "").run(queue, closing).await;
        for _ in 0..3 {
            heard.try_recv().unwrap();
        }
    }

    #[tokio::test]
    async fn without_a_ttrpc_socket_the_binary_publishes() {
        let directory = tempfile::tempdir().unwrap();
        let binary = directory.path().join("containerd");
        let out = directory.path().join("out");
        let script = format!("#!/bin/sh\necho \"$@\" > {0}\ncat >> {0}\n", out.display());
        fs::write(&binary, script).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        let (events, queue) = mpsc::unbounded_channel();
        let (close, closing) = oneshot::channel();
        events.send(started("a")).unwrap();
        close.send(()).unwrap();
        let none = Path::new("");
        publisher(none, &binary.display().to_string())
            .run(queue, closing)
            .await;
        let out = fs::read(out).unwrap();
        let split = out.iter().position(|byte| *byte == b'\n').unwrap();
        let line = String::from_utf8(out[..split].to_vec()).unwrap();
        assert_eq!(
            line,
            "--address /c.sock publish --topic /tasks/start --namespace default"
        );
        let event = Any::parse_from_bytes(&out[split + 1..]).unwrap();
        assert_eq!(event.type_url, "containerd.events.TaskStart");
    }
}
