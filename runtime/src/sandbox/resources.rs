//! What a container uses, and changing what it may use.

use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;

use super::create::detached;
use super::process::Status;
use super::{Error, Inner, Sandbox, Stats, Vm};
use crate::plan::{self, Update};

/// How long a guest may take for its numbers. Whoever asks does so every few seconds.
pub(super) const STATS: Duration = Duration::from_secs(2);

impl Sandbox {
    /// What the container uses, as its guest says. Of a paused container, what it used when it was
    /// paused.
    ///
    /// # Errors
    ///
    /// `NotFound`, also when the machine is gone; `Unavailable` when the guest doesn't answer soon.
    pub async fn stats(&self, id: &str) -> Result<Stats, Error> {
        let (vm, known) = self.inner.with(id, |container| {
            if container.vm.ended.borrow().is_some() {
                return Err(Error::not_found("cgroup does not exist"));
            }
            let paused = container.status("")? == Status::Paused;
            Ok((
                container.vm.clone(),
                paused.then(|| container.stats.clone()),
            ))
        })?;
        match known {
            Some(Some(stats)) => Ok(stats),
            Some(None) => Err(Error::NoStats {
                id: id.to_owned(),
                source: Box::new(Error::state("none were had before it was paused")),
            }),
            None => self.inner.ask_stats(id, &vm, STATS).await,
        }
    }

    /// Changes the container's limits; those that are left out stay.
    ///
    /// # Errors
    ///
    /// `NotFound`, `FailedPrecondition` when the container has stopped or is paused,
    /// `InvalidArgument` for limits its machine cannot give, and the guest's refusal.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), Error> {
        let vm = self.inner.with(id, |container| {
            match container.status("")? {
                Status::Created | Status::Running => {}
                Status::Paused => return Err(Error::state("cannot update a paused container")),
                Status::Stopped => return Err(Error::state("cannot update a stopped container")),
            }
            Ok(container.vm.clone())
        })?;
        let update = plan::update(resources, &vm.machine.size())?;
        let id = id.to_owned();
        detached(async move { vm.update(&id, update).await }).await
    }
}

impl Inner {
    /// Asks the guest, and keeps the answer for a time when it can't be asked.
    pub(super) async fn ask_stats(
        self: &Arc<Self>,
        id: &str,
        vm: &Vm,
        limit: Duration,
    ) -> Result<Stats, Error> {
        let limit = limit.min(self.timeouts.call);
        let answer = vm.call("reading statistics", vm.agent.stats(id, limit));
        let stats = answer.await.map_err(|error| Error::NoStats {
            id: id.to_owned(),
            source: Box::new(error),
        })?;
        self.with(id, |container| {
            container.stats = Some(stats.clone());
            Ok(())
        })?;
        Ok(stats)
    }
}

impl Vm {
    async fn update(&self, id: &str, update: Update) -> Result<(), Error> {
        for left_out in &update.left_out {
            tracing::info!(key = left_out.key, reason = left_out.reason, "left out");
        }
        let guest = serde_json::to_vec(&update.guest).map_err(|source| Error::Encode { source })?;
        self.call("changing limits", self.agent.update(id, guest))
            .await?;
        if let Some(cpuset) = update.cpuset {
            self.machine.set_cpuset(cpuset).await?;
        }
        if let Some(bytes) = update.balloon
            && let Err(error) = self.machine.set_balloon(bytes).await
        {
            // The limit holds; the host only gets less back.
            tracing::warn!(bytes, error = error.chain(), "the balloon keeps its size");
        }
        Ok(())
    }
}
