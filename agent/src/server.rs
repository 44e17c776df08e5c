//! The calls of `supermachine.agent.v1.Agent`.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use supermachine_protocol::ttrpc::r#async::{ServerStreamSender, TtrpcContext};
use supermachine_protocol::{
    Agent, ConnectRequest, ContainerRequest, CreateContainerRequest, Empty, Event,
    ExecProcessRequest, ListPidsResponse, ProcessRequest, ProcessResponse, ResizePtyRequest,
    SignalRequest, StatsResponse, UpdateContainerRequest, ttrpc, version_mismatch,
};

use crate::bundle::check_id;
use crate::changes::Changes;
use crate::container::{Container, Workshop};
use crate::error::Error;
use crate::identity::{self, About};
use crate::sys::lock;

type Reply<T> = ttrpc::Result<T>;

/// Serves the calls.
pub(crate) struct Service {
    workshop: Arc<Workshop>,
    containers: Mutex<HashMap<String, Slot>>,
    about: About,
    power_off: Option<fn()>,
}

#[derive(Clone)]
enum Slot {
    /// Its name is taken: it is being created or deleted.
    Busy,
    Made(Arc<Container>),
}

impl Service {
    /// `power_off` ends the machine after Shutdown; without it only the containers end.
    pub(crate) fn new(workshop: Arc<Workshop>, about: About, power_off: Option<fn()>) -> Self {
        Self {
            workshop,
            containers: Mutex::default(),
            about,
            power_off,
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.containers).get(id) {
            Some(Slot::Made(container)) => Ok(container.clone()),
            Some(Slot::Busy) => Err(Error::State(format!(
                "Container {id:?} is being created or deleted"
            ))),
            None => Err(Error::not_found("container", id)),
        }
    }

    /// What a container that has exited wrote to its root.
    pub(crate) fn changes(&self, id: &str) -> Result<Changes, Error> {
        self.container(id)?.changes()
    }

    async fn create(self: Arc<Self>, request: CreateContainerRequest) -> Result<u32, Error> {
        let id = request.container_id.clone();
        check_id("container_id", &id)?;
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&id) {
                return Err(Error::Exists {
                    kind: "container",
                    name: id,
                });
            }
            containers.insert(id.clone(), Slot::Busy);
        }
        match Container::create(self.workshop.clone(), request).await {
            Ok(container) => {
                let pid = container.process("")?.pid();
                lock(&self.containers).insert(id, Slot::Made(container));
                Ok(pid)
            }
            Err(error) => {
                lock(&self.containers).remove(&id);
                Err(error)
            }
        }
    }

    async fn delete(self: Arc<Self>, id: String) -> Result<(), Error> {
        let container = self.container(&id)?;
        if !container.has_exited() {
            return Err(Error::State(format!("Container {id:?} has not exited")));
        }
        lock(&self.containers).insert(id.clone(), Slot::Busy);
        let deleted = container.delete().await;
        let mut containers = lock(&self.containers);
        match &deleted {
            Ok(()) => drop(containers.remove(&id)),
            // It can be tried again.
            Err(_) => drop(containers.insert(id, Slot::Made(container))),
        }
        deleted
    }

    /// Ends every container.
    async fn end(self: Arc<Self>) -> Result<(), Error> {
        let containers: Vec<_> = lock(&self.containers)
            .drain()
            .map(|(_, slot)| slot)
            .collect();
        for slot in containers {
            if let Slot::Made(container) = slot
                && let Err(error) = container.delete().await
            {
                tracing::warn!(%error, "cannot end a container");
            }
        }
        Ok(())
    }
}

/// What is registered with the server.
#[derive(Clone)]
pub(crate) struct Calls(pub(crate) Arc<Service>);

impl Calls {
    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.0.container(id)
    }
}

/// Runs a call to its end, also when its caller gives up: what is half made must not be left so.
async fn complete<T: Send + 'static>(
    call: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Reply<T> {
    match tokio::spawn(call).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(ttrpc::Error::Others(error.to_string())),
    }
}

fn made(pid: u32) -> ProcessResponse {
    let mut response = ProcessResponse::new();
    response.pid = pid;
    response
}

#[async_trait]
impl Agent for Calls {
    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
        stream: ServerStreamSender<Event>,
    ) -> Reply<()> {
        if let Some(text) = version_mismatch("host", request.protocol_version) {
            return Err(Error::State(text).into());
        }
        if self.0.power_off.is_some() {
            identity::apply(&request);
        }
        let events = &self.0.workshop.events;
        let number = events.open_stream();
        stream.send(&self.0.about.ready()).await?;
        while let Some(event) = events.next(number).await {
            if let Err(error) = stream.send(&event).await {
                events.put_back(event);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Reply<ProcessResponse> {
        complete(self.0.clone().create(request)).await.map(made)
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Reply<Empty> {
        let container = self.container(&request.container_id)?;
        complete(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Reply<ProcessResponse> {
        let container = self.container(&request.container_id)?;
        complete(async move { container.exec(request).await.map(|process| process.pid()) })
            .await
            .map(made)
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Reply<Empty> {
        let container = self.container(&request.container_id)?;
        if !request.all {
            container
                .process(&request.exec_id)?
                .signal(request.signal)?;
        } else if request.exec_id.is_empty() {
            container.signal_all(request.signal)?;
        } else {
            return Err(Error::invalid("signal", "\"all\" goes with no exec_id").into());
        }
        Ok(Empty::new())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Reply<ListPidsResponse> {
        let mut response = ListPidsResponse::new();
        response.pids = self.container(&request.container_id)?.pids();
        Ok(response)
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Reply<Empty> {
        let container = self.container(&request.container_id)?;
        container
            .process(&request.exec_id)?
            .resize(request.columns, request.rows)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> Reply<StatsResponse> {
        Ok(self.container(&request.container_id)?.stats())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Reply<Empty> {
        let container = self.container(&request.container_id)?;
        container.update(&request.resources_json)?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> Reply<Empty> {
        let container = self.container(&request.container_id)?;
        container.process(&request.exec_id)?.close_input();
        Ok(Empty::new())
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Reply<Empty> {
        complete(self.0.clone().delete(request.container_id)).await?;
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> Reply<Empty> {
        let container = self.container(&request.container_id)?;
        container.delete_process(&request.exec_id)?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Reply<Empty> {
        complete(self.0.clone().end()).await?;
        if let Some(power_off) = self.0.power_off {
            // The machine's end is the answer; there is another only when this fails.
            power_off();
        }
        Ok(Empty::new())
    }
}
