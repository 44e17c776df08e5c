//! Confinement of the VMM child: what the process gives up before it reads its first request.
//!
//! Everything the child works with comes to it as open files over the control socket, so it can
//! renounce what would get it more. Each [`Layer`] holds if all the others have a hole. A layer the
//! host lacks is an error unless the [`Policy`] lets it be missing, and then it is told.
//!
//! Nothing here knows of VMs, so that any program can confine a child of its own: it calls
//! [`close_inherited`] first of all, opens what it needs, and calls [`enter`] before it starts a
//! thread (but for [`enter_beside`]'s) or reads a byte it doesn't trust. Each of its threads may
//! then narrow what it may call by a [`Filter`] of its own.

pub mod calls;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
mod filter;
#[cfg(target_os = "linux")]
mod ids;
#[cfg(target_os = "linux")]
mod landlock;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod namespaces;
#[cfg(target_os = "linux")]
mod program;
#[cfg(target_os = "linux")]
mod root;
#[cfg(target_os = "linux")]
mod seccomp;

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

#[cfg(not(target_os = "linux"))]
pub(crate) use elsewhere::call_name;
#[cfg(not(target_os = "linux"))]
pub use elsewhere::{
    Inside, close_inherited, enter, enter_beside, enter_network, new_network, spawn_apart,
};
pub use filter::{
    EXIT_STATUS as SECCOMP_EXIT_STATUS, Filter, REPORT as SECCOMP_REPORT, Rule, Seccomp, When,
    absent, allow, allow_if,
};
#[cfg(target_os = "linux")]
pub use linux::{Keep, close_inherited, enter, enter_beside, enter_keeping};
#[cfg(target_os = "linux")]
pub use namespaces::{Inside, enter_network, new_network, spawn_apart};
#[cfg(target_os = "linux")]
pub(crate) use seccomp::call_name;

pub use crate::sys::threads::EVERY;

/// One wall around the process. What needs no help of the host (no new privileges, no
/// capabilities, no core dumps, limits) isn't listed: it holds everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// User and group ids that nobody else has, and no supplementary groups.
    Ids,
    /// A user namespace, in which capabilities would be worth nothing.
    UserNamespace,
    /// A pid namespace: no other process can be named.
    Pid,
    /// A mount namespace whose root is empty and read-only.
    Root,
    /// A network namespace without an interface that is up.
    Network,
    /// Namespaces of ipc, host name and cgroups.
    Ipc,
    /// Landlock: no file, no TCP port, no abstract socket, whatever else is reachable.
    Landlock,
    /// Seccomp: only the system calls that each kind of thread needs.
    Seccomp,
}

impl Layer {
    /// All of them, from the outermost.
    pub const ALL: [Self; 8] = [
        Self::Ids,
        Self::UserNamespace,
        Self::Pid,
        Self::Root,
        Self::Network,
        Self::Ipc,
        Self::Landlock,
        Self::Seccomp,
    ];

    /// Its name in configurations and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ids => "ids",
            Self::UserNamespace => "user-namespace",
            Self::Pid => "pid",
            Self::Root => "root",
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        }
    }

    /// The layer of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layer| layer.as_str() == name)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How strictly to confine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Layers without which the process starts all the same, where the host lacks them.
    pub allow_missing: Vec<Layer>,
    /// The process's user and group id is this plus its process id on the host: no two that run
    /// have the same.
    pub first_id: u32,
    /// What a forbidden system call does.
    #[serde(default)]
    pub seccomp: Seccomp,
}

impl Policy {
    /// The first of the ids that systemd's table of them (UIDS-GIDS.md) leaves unused, with room
    /// for every process id above it.
    pub const FIRST_ID: u32 = 0x7000_0000;
}

impl Default for Policy {
    /// Strict, but for what kernels in wide use are built or configured without and other layers
    /// make up for.
    fn default() -> Self {
        Self {
            allow_missing: vec![Layer::UserNamespace, Layer::Landlock],
            first_id: Self::FIRST_ID,
            seccomp: Seccomp::default(),
        }
    }
}

/// A layer that the host lacks and the policy let be missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Missing {
    /// Which.
    pub layer: Layer,
    /// What the kernel said.
    pub reason: String,
}

/// Why a process is not confined, and must not go on.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A step that every host allows was refused.
    #[error("Confine the process: {0}")]
    Step(#[source] Refused),
    /// The host lacks a layer that the policy asks for.
    #[error(
        "Confine the process: this host lacks layer \"{layer}\", and allow_missing doesn't name it"
    )]
    Lacks {
        /// Which.
        layer: Layer,
        /// What the kernel said.
        source: Refused,
    },
}

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct Refused {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Names the step that failed.
fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Refused {
    move |source| Refused {
        step,
        source: source.into(),
    }
}
