//! What a container needs, decided without touching anything.
//!
//! [`plan`] is a pure function of the request, its OCI configuration, what is known of the host
//! and the administrator's configuration. Its result can be printed (`supermachine plan BUNDLE`)
//! and compared, which is how it is tested. [`crate::acquire`] carries it out.

mod facts;
mod guest_spec;
mod hooks;
mod machine;
mod mounts;
mod rootfs;
mod snapshot;
mod template;
mod update;

use std::path::PathBuf;

use oci_spec::runtime::{Process, Spec};
use serde::Serialize;

use crate::config::Resolved;
use crate::request::{Create, Stream};

pub use facts::HostFacts;
pub use hooks::Hooks;
pub use mounts::{FILES_MAX, HostFile};
pub use update::{MachineSize, Update, update};

pub(crate) use template::split_layers;

pub use rootfs::{
    Changes, Disk, IMAGES_MAX, Image, MakeExt4, NamedImage, NewDirectory, Rootfs, Source,
};

/// Why a request can't be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Leaving it out would change what the container was promised.
    #[error("{key} is not supported in a microVM: {reason}")]
    Unsupported { key: String, reason: String },
    #[error("{key} is missing from the container's configuration")]
    Missing { key: &'static str },
    #[error("{key} is {value:?}; expected {expected}")]
    Invalid {
        key: String,
        value: String,
        expected: &'static str,
    },
    #[error(
        "linux.resources.memory.limit is {limit} bytes, more than the {machine} bytes of the \
         container's machine, which does not grow while it runs"
    )]
    MemoryAboveMachine { limit: u64, machine: u64 },
}

/// Everything that is to be acquired and started for one container.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The container's identifier.
    pub id: String,
    /// Virtual processors of the machine.
    pub vcpus: u32,
    /// Memory of the machine in bytes, whole MiB.
    pub memory: u64,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// The machine's disks, in the order they are attached.
    pub disks: Vec<Disk>,
    /// How the agent makes the root file system of those disks.
    pub rootfs: Rootfs,
    /// Files of the host that the guest has copies of.
    pub files: Vec<HostFile>,
    /// What the host runs around the container's life.
    pub hooks: Hooks,
    /// Where what it wrote goes.
    pub changes: Option<Changes>,
    /// The container's host name, which the machine gets as well.
    pub hostname: Option<String>,
    /// Which streams the container's first process has.
    pub stdio: Streams,
    /// The host's cgroup for the machine, relative to the cgroup file systems' roots.
    pub cgroup: Option<PathBuf>,
    /// The host's processors the machine may run on, as a cpuset list; empty means all.
    pub cpuset: String,
    /// The OCI configuration as the guest is to run it.
    pub guest_spec: Spec,
    /// What was left out of the container's configuration, and why that is harmless.
    pub left_out: Vec<LeftOut>,
}

impl Plan {
    /// The plan as JSON whose text is always the same: sets in it have no order of their own.
    ///
    /// # Errors
    /// A path in it isn't UTF-8.
    pub fn to_json(&self) -> Result<serde_json::Value, serde_json::Error> {
        let mut value = serde_json::to_value(self)?;
        let capabilities = value.pointer_mut("/guest_spec/process/capabilities");
        for set in capabilities
            .and_then(|sets| sets.as_object_mut())
            .into_iter()
            .flatten()
        {
            if let Some(set) = set.1.as_array_mut() {
                set.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
        }
        Ok(value)
    }
}

/// A key of the container's configuration that the guest doesn't get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    pub key: String,
    pub reason: &'static str,
}

/// Which standard streams a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Streams {
    pub terminal: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// `Err` naming `key` if `present`.
fn refuse(present: bool, key: &str, reason: &str) -> Result<(), Error> {
    if present {
        Err(Error::Unsupported {
            key: key.to_owned(),
            reason: reason.to_owned(),
        })
    } else {
        Ok(())
    }
}

fn some<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// The guest's kernel command line, before the administrator's additions: the serial port is a
/// log and nothing else; a panic is logged and ends the machine at once, by the keyboard controller's
/// reset line, so that it is no triple fault.
#[cfg(not(target_arch = "aarch64"))]
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 reboot=k tsc=reliable";
/// The guest's kernel command line, before the administrator's additions: the serial port, a PL011,
/// is a log and nothing else; a panic is logged and ends the machine at once, by PSCI.
#[cfg(target_arch = "aarch64")]
const CMDLINE: &str = "console=ttyAMA0 quiet loglevel=3 panic=-1";

/// Decides what the container of `create` needs.
///
/// # Errors
/// The configuration misses something, contradicts itself, or asks for what a microVM can't give.
pub fn plan(
    create: &Create,
    spec: &Spec,
    facts: &HostFacts,
    config: &Resolved,
) -> Result<Plan, Error> {
    let mut left_out = Vec::new();
    let layout = rootfs::layout(create, spec, facts, config)?;
    let shape = machine::shape(spec, facts, config)?;
    let (mounts, files) = mounts::build(spec, &create.bundle, facts)?;
    let id = create.id.as_str();
    let guest_spec = guest_spec::build(spec, id, layout.read_only, mounts, &mut left_out)?;
    let has = |stream: &Stream| *stream != Stream::None;
    Ok(Plan {
        id: create.id.to_string(),
        vcpus: shape.vcpus,
        memory: shape.memory,
        cmdline: match config.kernel.cmdline.trim() {
            "" => CMDLINE.to_owned(),
            more => format!("{CMDLINE} {more}"),
        },
        disks: layout.disks,
        rootfs: layout.rootfs,
        files,
        hooks: hooks::build(spec)?,
        changes: layout.changes,
        hostname: spec.hostname().clone(),
        stdio: Streams {
            terminal: create.stdio.terminal,
            stdin: has(&create.stdio.stdin),
            stdout: has(&create.stdio.stdout),
            stderr: has(&create.stdio.stderr),
        },
        cgroup: machine::host_cgroup(spec)?,
        cpuset: shape.cpuset,
        guest_spec,
        left_out,
    })
}

/// The process of an exec request as the guest is to run it.
///
/// # Errors
/// As [`plan`], for the keys of a process.
pub fn exec_process(process: &Process) -> Result<Process, Error> {
    guest_spec::process(process, &mut Vec::new())
}

#[cfg(test)]
mod tests;
