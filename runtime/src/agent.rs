//! The host's end of the connection to a guest's agent.
//!
//! Every call has a deadline. What the agent says comes from the guest: texts are cut to size and
//! stripped of control characters, names and numbers are checked by whoever uses them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use supermachine_protocol as protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::Code;
use ttrpc::r#async::{Client, ClientStreamReceiver, transport::Socket};
use ttrpc::context::{Context, with_duration, with_timeout};

use crate::sandbox::{Error, Kind};

/// Longest text taken over from a guest, in characters.
const TEXT_MAX: usize = 2048;

/// The answer to a vsock connection request is one short line.
const REPLY_MAX: usize = 64;

/// Bytes of fresh entropy given to a guest.
const ENTROPY: usize = 32;

/// A connected agent that speaks our version of the protocol.
#[derive(Clone)]
pub(crate) struct Agent {
    client: protocol::AgentClient,
    call: Duration,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

/// What the guest reports of itself; ends with the connection.
pub(crate) type Events = ClientStreamReceiver<protocol::Event>;

/// Connects to `port` of the guest whose vsock device listens on `socket`.
pub(crate) async fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut reply = Vec::with_capacity(REPLY_MAX);
    // Byte by byte: what follows the line belongs to the connection.
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if reply.len() < REPLY_MAX => reply.push(byte),
            Ok(_) => return Err(io::Error::other("the reply to CONNECT is too long")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Err(error) => return Err(error),
        }
    }
    if reply.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::Error::other(format!(
            "the reply to CONNECT is {:?}, expected \"OK <port>\"",
            String::from_utf8_lossy(&reply)
        )))
    }
}

impl Agent {
    /// Introduces the host over `stream`, which leads to an agent: gives the guest the time,
    /// entropy, `hostname` and a machine id of its own, and opens the event stream.
    ///
    /// `call` is the longest any later call may take.
    pub(crate) async fn connect(
        stream: UnixStream,
        hostname: &str,
        call: Duration,
    ) -> Result<(Self, Events), Error> {
        const DURING: &str = "connecting to it";
        let client = protocol::AgentClient::new(Client::new(Socket::from(stream)));
        let mut request = protocol::ConnectRequest::new();
        request.protocol_version = protocol::VERSION;
        request.host_time_ns = nanoseconds(SystemTime::now());
        request.entropy = random::<ENTROPY>()?.to_vec();
        request.hostname = hostname.to_owned();
        request.machine_id = machine_id(random()?);
        let agent = Self { client, call };
        // A deadline of the call would end the stream, so only its first event has one.
        let mut events = agent
            .client
            .connect(with_timeout(0), &request)
            .await
            .map_err(|error| fault(DURING, call, error))?;
        let first = tokio::time::timeout(call, events.recv())
            .await
            .map_err(|_| silent(DURING, call))?
            .map_err(|error| fault(DURING, call, error))?;
        let Some(protocol::event::Kind::Ready(ready)) = first.and_then(|event| event.kind) else {
            return Err(Error::Guest {
                kind: Kind::Internal,
                text: "The guest's agent did not greet with its version".to_owned(),
            });
        };
        if let Some(text) = protocol::version_mismatch("guest's agent", ready.protocol_version) {
            return Err(Error::Guest {
                kind: Kind::FailedPrecondition,
                text,
            });
        }
        tracing::info!(
            agent = clean(&ready.agent_version),
            kernel = clean(&ready.kernel_release),
            init_ms = ready.init_uptime_ns / 1_000_000,
            listening_ms = ready.listening_uptime_ns / 1_000_000,
            cpus = ready.cpus,
            memory = ready.memory,
            "the guest is ready"
        );
        Ok((agent, events))
    }

    fn deadline(&self) -> Context {
        with_duration(self.call)
    }

    fn fault(&self, during: &'static str) -> impl FnOnce(ttrpc::Error) -> Error {
        let limit = self.call;
        move |error| fault(during, limit, error)
    }

    pub(crate) async fn create_container(
        &self,
        request: &protocol::CreateContainerRequest,
    ) -> Result<(), Error> {
        let answer = self.client.create_container(self.deadline(), request).await;
        answer
            .map(drop)
            .map_err(self.fault("creating the container"))
            .map_err(in_runcs_words(
                "create failed: unable to start container process: error during container init",
            ))
    }

    pub(crate) async fn start_container(&self, container_id: &str) -> Result<(), Error> {
        let mut request = protocol::ContainerRequest::new();
        request.container_id = container_id.to_owned();
        let answer = self.client.start_container(self.deadline(), &request).await;
        answer
            .map(drop)
            .map_err(self.fault("starting the container"))
            .map_err(in_runcs_words("start failed"))
    }

    pub(crate) async fn exec(&self, request: &protocol::ExecProcessRequest) -> Result<(), Error> {
        let answer = self.client.exec_process(self.deadline(), request).await;
        answer
            .map(drop)
            .map_err(self.fault("starting a process"))
            .map_err(in_runcs_words(
                "exec failed: exec failed: unable to start container process",
            ))
    }

    pub(crate) async fn signal(
        &self,
        container_id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let mut request = protocol::SignalRequest::new();
        request.container_id = container_id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.signal = signal;
        request.all = all;
        let answer = self.client.signal(self.deadline(), &request).await;
        answer.map(drop).map_err(self.fault("sending a signal"))
    }

    /// What the container uses; the answer comes within `limit` or not at all.
    pub(crate) async fn stats(
        &self,
        container_id: &str,
        limit: Duration,
    ) -> Result<protocol::StatsResponse, Error> {
        let mut request = protocol::ContainerRequest::new();
        request.container_id = container_id.to_owned();
        let answer = self.client.stats(with_duration(limit), &request).await;
        answer.map_err(|error| fault("reading statistics", limit, error))
    }

    pub(crate) async fn update(
        &self,
        container_id: &str,
        resources_json: Vec<u8>,
    ) -> Result<(), Error> {
        let mut request = protocol::UpdateContainerRequest::new();
        request.container_id = container_id.to_owned();
        request.resources_json = resources_json;
        let answer = self.client.update_container(self.deadline(), &request);
        answer
            .await
            .map(drop)
            .map_err(self.fault("changing limits"))
    }

    pub(crate) async fn resize(
        &self,
        container_id: &str,
        exec_id: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), Error> {
        let mut request = protocol::ResizePtyRequest::new();
        request.container_id = container_id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.columns = columns;
        request.rows = rows;
        let answer = self.client.resize_pty(self.deadline(), &request).await;
        answer.map(drop).map_err(self.fault("resizing a terminal"))
    }

    pub(crate) async fn delete_process(
        &self,
        container_id: &str,
        exec_id: &str,
    ) -> Result<(), Error> {
        let mut request = protocol::ProcessRequest::new();
        request.container_id = container_id.to_owned();
        request.exec_id = exec_id.to_owned();
        let answer = self.client.delete_process(self.deadline(), &request).await;
        answer.map(drop).map_err(self.fault("deleting a process"))
    }

    /// Asks the guest to power off, waiting no longer than `limit` for its answer.
    pub(crate) async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        let answer = self
            .client
            .shutdown(with_duration(limit), &protocol::Empty::new())
            .await;
        answer
            .map(drop)
            .map_err(|error| fault("shutting it down", limit, error))
    }
}

/// Puts before a program's failure what runc's shim does: clients look for these words.
fn in_runcs_words(during: &'static str) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Guest {
            kind: Kind::Program,
            text,
        } => Error::Guest {
            kind: Kind::Program,
            text: format!("OCI runtime {during}: {text}"),
        },
        other => other,
    }
}

fn nanoseconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// Fresh bytes, for the guest and nobody else.
fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|source| Error::Machine {
            what: "no entropy for the guest from /dev/urandom",
            source: source.into(),
        })?;
    Ok(bytes)
}

/// Random bytes as machine-id(5) has them: a UUID of version 4 in hexadecimal, without dashes.
fn machine_id(mut random: [u8; 16]) -> String {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    format!("{:032x}", u128::from_be_bytes(random))
}

fn silent(during: &str, limit: Duration) -> Error {
    Error::Silent {
        limit,
        last: format!("it was {during}"),
    }
}

fn fault(during: &'static str, limit: Duration, error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let kind = match status.code() {
                Code::NOT_FOUND => Kind::NotFound,
                Code::ALREADY_EXISTS => Kind::AlreadyExists,
                Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
                Code::INVALID_ARGUMENT => Kind::InvalidArgument,
                Code::DEADLINE_EXCEEDED => return silent(during, limit),
                Code::UNKNOWN => Kind::Program,
                _ => Kind::Internal,
            };
            Error::Guest {
                kind,
                text: clean(status.message()),
            }
        }
        // The client's own deadline has no variant of its own.
        ttrpc::Error::Others(text) if text.contains("deadline elapsed") => silent(during, limit),
        other => Error::Connection {
            during,
            text: clean(&other.to_string()),
        },
    }
}

/// A guest's text, fit for logs and error messages.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .take(TEXT_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
