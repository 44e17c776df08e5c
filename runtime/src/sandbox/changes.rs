//! What a container wrote, on its way from the guest to the snapshot.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use supermachine_protocol as protocol;
use supermachine_protocol::changes::ask;

use super::error::Error;
use super::vm::{Vmm, blocking, machine_error};
use crate::agent;
use crate::changes::{self, Job, Outcome, Place};
use crate::config::Resolved;
use crate::ledger::Entry;
use crate::plan;
use crate::request::Create;

/// What it is called in errors.
const WHAT: &str = "saving what the container wrote";

/// Where a container's changes go, and within which limits.
#[derive(Clone, Debug)]
pub(super) struct Saving {
    directory: PathBuf,
    /// Nobody else's.
    name: String,
    job: Job,
    /// For the connection to the agent.
    call: Duration,
}

/// Why they are not in the snapshot.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("The snapshot {} is as it was before: {reason}", directory.display())]
    All { directory: PathBuf, reason: String },
    #[error("The snapshot {} holds a part of it: {reason}", directory.display())]
    Partly { directory: PathBuf, reason: String },
    #[error("Cannot {action}")]
    Step {
        action: &'static str,
        source: io::Error,
    },
}

impl Saving {
    pub(super) fn new(changes: plan::Changes, request: &Create, config: &Resolved) -> Self {
        Self {
            directory: changes.directory,
            name: format!("{}-{}", request.namespace, request.id),
            job: Job {
                overlay: changes.overlay,
                entries: config.changes.entries.0,
                bytes: changes.most,
                time: config.changes.time.0,
                silence: config.timeouts.call.0,
                jail: config.jail.policy(),
            },
            call: config.timeouts.call.0,
        }
    }

    /// Saves what container `id` of `machine` wrote.
    pub(super) async fn save(self, machine: &Vmm, id: &str) -> Result<(), Error> {
        let Self {
            directory,
            name,
            job,
            call,
        } = self;
        let of = directory.clone();
        let place = blocking(WHAT, move || {
            Place::new(&of, &name).map_err(step("find the snapshot's directory"))
        })
        .await?;
        machine.record(Entry::Tree {
            path: place.staging.clone(),
        })?;
        let dial = agent::dial(machine.socket(), protocol::CHANGES_VSOCK_PORT);
        let stream = tokio::time::timeout(call, dial)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .and_then(tokio::net::UnixStream::into_std)
            .and_then(|stream| stream.set_nonblocking(false).map(|()| stream))
            .and_then(|stream| ask(&stream, id).map(|()| stream))
            .map_err(step("connect to the guest"))?;
        let staging = place.staging.clone();
        let started = blocking(WHAT, move || {
            let started = changes::start(&job, &place, &stream);
            started.map_err(step("start the process that does it"))
        });
        let outcome = match started.await {
            Ok(started) => {
                machine.adopt_child(started.pid())?;
                Ok(started.outcome().await)
            }
            Err(error) => Err(error),
        };
        let removed = blocking(WHAT, move || {
            fs::remove_dir_all(staging).map_err(step("remove the staging directory"))
        });
        if let Err(error) = removed.await {
            tracing::warn!(error = error.chain(), "something is left behind");
        }
        match outcome? {
            Outcome::Written { entries, bytes } => {
                tracing::info!(id, entries, bytes, "saved what the container wrote");
                Ok(())
            }
            Outcome::Refused { reason } => Err(lost(Lost::All { directory, reason })),
            Outcome::Partial { reason } => Err(lost(Lost::Partly { directory, reason })),
        }
    }
}

fn lost(lost: Lost) -> Error {
    machine_error(WHAT, lost)
}

fn step(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| lost(Lost::Step { action, source })
}
