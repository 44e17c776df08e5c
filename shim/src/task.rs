//! containerd's Task service: each call is decoded, done by the runtime, and encoded.
//!
//! What is not offered (checkpoints) is answered by name with `UNIMPLEMENTED`, which containerd
//! shows as "not implemented".

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async;
use containerd_shim_protos::types::task::{ProcessInfo, Status as ApiStatus};
use protobuf::well_known_types::timestamp::Timestamp;
use supermachine_runtime::events::Exit;
use supermachine_runtime::request::{self, Stdio};
use supermachine_runtime::sandbox::{Error, Kind, Sandbox, Status};
use tokio::sync::Notify;
use ttrpc::asynchronous::{Service, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::args::Args;
use crate::metrics;

/// The service's name since containerd 2.0, and before. The protocols differ in nothing else.
const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";

/// One container's Task service.
#[derive(Clone)]
pub(crate) struct Task {
    namespace: String,
    sandbox: Sandbox,
    /// Which numbers containerd's clients expect.
    metrics: metrics::Mode,
    /// Told when containerd wants the daemon gone.
    done: Arc<Notify>,
    /// Told when the last task has been deleted.
    emptied: Arc<Notify>,
}

impl Task {
    pub(crate) fn new(args: &Args, sandbox: Sandbox, done: Arc<Notify>) -> Self {
        Self {
            namespace: args.namespace.clone(),
            sandbox,
            metrics: metrics::Mode::of_host(),
            done,
            emptied: Arc::default(),
        }
    }

    /// Waits until the last task has been deleted and, for as long as `patience`, there was no other.
    ///
    /// containerd asks for the daemon's end right after that. One that was killed in between and
    /// came back finds no task, and asks nobody for anything.
    pub(crate) async fn abandoned(&self, patience: Duration) {
        loop {
            self.emptied.notified().await;
            // Each deletion starts the time anew.
            while tokio::time::timeout(patience, self.emptied.notified())
                .await
                .is_ok()
            {}
            if self.sandbox.is_empty() {
                return;
            }
        }
    }
}

/// The methods of `task`, under both names.
pub(crate) fn services(task: Task) -> HashMap<String, Service> {
    let task = Arc::new(task);
    let mut services = shim_async::create_task(task.clone());
    if let Some(v2) = shim_async::create_task(task).remove(V3) {
        services.insert(V2.to_owned(), v2);
    }
    services
}

type Reply<T> = ttrpc::Result<T>;

#[async_trait]
impl shim_async::Task for Task {
    async fn create(
        &self,
        _: &TtrpcContext,
        req: api::CreateTaskRequest,
    ) -> Reply<api::CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return Err(unimplemented("Create from a checkpoint"));
        }
        let stdio = stdio(&req.stdin, &req.stdout, &req.stderr, req.terminal)?;
        let rootfs = req.rootfs.into_iter().map(|mount| request::Mount {
            kind: mount.type_,
            source: mount.source,
            options: mount.options,
            target: mount.target,
        });
        let create = request::Create::new(
            &self.namespace,
            &req.id,
            Path::new(&req.bundle),
            rootfs.collect(),
            stdio,
        );
        let create = create.map_err(|error| status(error.into()))?;
        let mut reply = api::CreateTaskResponse::new();
        reply.pid = self.sandbox.create(create).await.map_err(status)?;
        Ok(reply)
    }

    async fn start(&self, _: &TtrpcContext, req: api::StartRequest) -> Reply<api::StartResponse> {
        let mut reply = api::StartResponse::new();
        reply.pid = self
            .sandbox
            .start(&req.id, &req.exec_id)
            .await
            .map_err(status)?;
        Ok(reply)
    }

    async fn exec(&self, _: &TtrpcContext, req: api::ExecProcessRequest) -> Reply<api::Empty> {
        let stdio = stdio(&req.stdin, &req.stdout, &req.stderr, req.terminal)?;
        let exec = request::Exec::new(&req.id, &req.exec_id, &req.spec.value, stdio)
            .map_err(|error| status(error.into()))?;
        self.sandbox.exec(exec).map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, req: api::StateRequest) -> Reply<api::StateResponse> {
        let state = self.sandbox.state(&req.id, &req.exec_id).map_err(status)?;
        let mut reply = api::StateResponse::new();
        reply.id = req.id;
        reply.exec_id = req.exec_id;
        reply.bundle = state.bundle.display().to_string();
        reply.pid = state.pid;
        reply.status = match state.status {
            Status::Created => ApiStatus::CREATED,
            Status::Running => ApiStatus::RUNNING,
            Status::Paused => ApiStatus::PAUSED,
            Status::Stopped => ApiStatus::STOPPED,
        }
        .into();
        reply.stdin = state.stdio.stdin.to_string();
        reply.stdout = state.stdio.stdout.to_string();
        reply.stderr = state.stdio.stderr.to_string();
        reply.terminal = state.stdio.terminal;
        if let Some(Exit { status, at }) = state.exit {
            reply.exit_status = status;
            reply.exited_at = Some(timestamp(at)).into();
        }
        Ok(reply)
    }

    async fn kill(&self, _: &TtrpcContext, req: api::KillRequest) -> Reply<api::Empty> {
        self.sandbox
            .kill(&req.id, &req.exec_id, req.signal, req.all)
            .await
            .map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, req: api::WaitRequest) -> Reply<api::WaitResponse> {
        let exit = self
            .sandbox
            .wait(&req.id, &req.exec_id)
            .await
            .map_err(status)?;
        let mut reply = api::WaitResponse::new();
        reply.exit_status = exit.status;
        reply.exited_at = Some(timestamp(exit.at)).into();
        Ok(reply)
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        req: api::DeleteRequest,
    ) -> Reply<api::DeleteResponse> {
        let (pid, exit) = self
            .sandbox
            .delete(&req.id, &req.exec_id)
            .await
            .map_err(status)?;
        if self.sandbox.is_empty() {
            self.emptied.notify_one();
        }
        let mut reply = api::DeleteResponse::new();
        reply.pid = pid;
        reply.exit_status = exit.status;
        reply.exited_at = Some(timestamp(exit.at)).into();
        Ok(reply)
    }

    async fn pids(&self, _: &TtrpcContext, req: api::PidsRequest) -> Reply<api::PidsResponse> {
        // Pids are the host's to whoever asks; on the host there is the machine's process alone.
        let mut process = ProcessInfo::new();
        process.pid = self.sandbox.pid(&req.id).map_err(status)?;
        let mut reply = api::PidsResponse::new();
        reply.processes.push(process);
        Ok(reply)
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: api::ResizePtyRequest) -> Reply<api::Empty> {
        self.sandbox
            .resize(&req.id, &req.exec_id, req.width, req.height)
            .await
            .map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: api::CloseIORequest) -> Reply<api::Empty> {
        if req.stdin {
            self.sandbox
                .close_stdin(&req.id, &req.exec_id)
                .map_err(status)?;
        }
        Ok(api::Empty::new())
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        req: api::ConnectRequest,
    ) -> Reply<api::ConnectResponse> {
        let mut reply = api::ConnectResponse::new();
        reply.shim_pid = std::process::id();
        // Before there is a container there is no task, but there is a shim.
        reply.task_pid = self.sandbox.pid(&req.id).unwrap_or(0);
        reply.version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(reply)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Reply<api::Empty> {
        // Others may still live here; containerd asks after each.
        if self.sandbox.is_idle() {
            self.done.notify_one();
        }
        Ok(api::Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, req: api::PauseRequest) -> Reply<api::Empty> {
        self.sandbox.pause(&req.id).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> Reply<api::Empty> {
        self.sandbox.resume(&req.id).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> Reply<api::Empty> {
        Err(unimplemented("Checkpoint"))
    }

    async fn update(&self, _: &TtrpcContext, req: api::UpdateTaskRequest) -> Reply<api::Empty> {
        let limits = req.resources.unwrap_or_default();
        let limits = request::resources(&limits.type_url, &limits.value)
            .map_err(|error| status(error.into()))?;
        self.sandbox
            .update(&req.id, &limits)
            .await
            .map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, req: api::StatsRequest) -> Reply<api::StatsResponse> {
        let stats = self.sandbox.stats(&req.id).await.map_err(status)?;
        let mut reply = api::StatsResponse::new();
        reply.stats = Some(metrics::message(&stats, self.metrics)).into();
        Ok(reply)
    }
}

fn stdio(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Reply<Stdio> {
    Stdio::new(stdin, stdout, stderr, terminal).map_err(|error| status(error.into()))
}

fn unimplemented(what: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(
        Code::UNIMPLEMENTED,
        format!("{what} is not supported by supermachine"),
    ))
}

/// The runtime's refusal in containerd's terms.
fn status(error: Error) -> ttrpc::Error {
    let code = match error.kind() {
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        Kind::InvalidArgument => Code::INVALID_ARGUMENT,
        Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        Kind::Unavailable => Code::UNAVAILABLE,
        Kind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        Kind::Unimplemented => Code::UNIMPLEMENTED,
        Kind::Program => Code::UNKNOWN,
        Kind::Internal => Code::INTERNAL,
    };
    let mut text = error.chain();
    // So Go's errdefs ends its texts, and of some errors ctr prints nothing else.
    let name = match code {
        Code::NOT_FOUND => ": not found",
        Code::ALREADY_EXISTS => ": already exists",
        _ => "",
    };
    if !text.ends_with(name) {
        text.push_str(name);
    }
    ttrpc::Error::RpcStatus(get_status(code, text))
}

/// A moment as protobuf has it; moments before 1970 become 1970.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut stamp = Timestamp::new();
    stamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    stamp.nanos = i32::try_from(since.subsec_nanos()).unwrap_or(0);
    stamp
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::shim_async::{Client, TaskClient};
    use protobuf::Message;
    use supermachine_runtime::config::Resolved;
    use tokio::net::{UnixListener, UnixStream};
    use tokio::sync::mpsc;
    use ttrpc::asynchronous::Server;
    use ttrpc::asynchronous::transport::{Listener, Socket};
    use ttrpc::context::with_timeout;

    use super::*;

    /// A service without a container, and a connection to it.
    async fn serve(directory: &Path) -> (Server, Client, Arc<Notify>) {
        let line = ["-namespace", "default", "-id", "c1"].map(str::to_owned);
        let args = Args::parse(line.into_iter()).unwrap();
        let sandbox = Sandbox::new(Resolved::default(), mpsc::unbounded_channel().0);
        let done = Arc::new(Notify::new());
        let path = directory.join("task");
        let listener = Listener::from(UnixListener::bind(&path).unwrap());
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(services(Task::new(&args, sandbox, done.clone())));
        server.start().await.unwrap();
        let stream = UnixStream::connect(&path).await.unwrap();
        (server, Client::new(Socket::from(stream)), done)
    }

    fn code<T: std::fmt::Debug>(reply: ttrpc::Result<T>) -> Code {
        match reply.unwrap_err() {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn both_names_lead_to_the_same_methods() {
        let directory = tempfile::tempdir().unwrap();
        let (_server, client, _) = serve(directory.path()).await;
        for service in [V2, V3] {
            let mut request = ttrpc::Request::new();
            request.service = service.to_owned();
            request.method = "Connect".to_owned();
            request.payload = api::ConnectRequest::new().write_to_bytes().unwrap();
            let reply = client.request(request).await.unwrap();
            let reply = api::ConnectResponse::parse_from_bytes(&reply.payload).unwrap();
            assert_eq!(reply.shim_pid, std::process::id(), "{service}");
        }
    }

    #[tokio::test]
    async fn refusals_have_containerds_codes() {
        let directory = tempfile::tempdir().unwrap();
        let (_server, client, _) = serve(directory.path()).await;
        let task = TaskClient::new(client);
        let mut state = api::StateRequest::new();
        state.id = "c1".to_owned();
        assert_eq!(
            code(task.state(with_timeout(0), &state).await),
            Code::NOT_FOUND
        );
        let checkpoint = api::CheckpointTaskRequest::new();
        let checkpoint = task.checkpoint(with_timeout(0), &checkpoint).await;
        assert_eq!(code(checkpoint), Code::UNIMPLEMENTED);
        let stats = task.stats(with_timeout(0), &api::StatsRequest::new()).await;
        assert_eq!(code(stats), Code::NOT_FOUND);
        let update = api::UpdateTaskRequest::new();
        let update = task.update(with_timeout(0), &update).await;
        assert_eq!(code(update), Code::INVALID_ARGUMENT);
        let mut create = api::CreateTaskRequest::new();
        create.id = "../c1".to_owned();
        create.bundle = "/b".to_owned();
        let create = task.create(with_timeout(0), &create).await;
        assert_eq!(code(create), Code::INVALID_ARGUMENT);
    }

    #[tokio::test]
    async fn an_empty_sandbox_may_be_shut_down() {
        let directory = tempfile::tempdir().unwrap();
        let (_server, client, done) = serve(directory.path()).await;
        let task = TaskClient::new(client);
        let request = api::ShutdownRequest::new();
        task.shutdown(with_timeout(0), &request).await.unwrap();
        let told = tokio::time::timeout(std::time::Duration::from_secs(5), done.notified());
        told.await.unwrap();
    }
}
