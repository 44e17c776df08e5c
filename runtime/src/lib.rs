//! From a container request to a running microVM.
//!
//! Data flows one way: [`request`] is what containerd asked for, validated;
//! [`plan`] decides, without touching anything, what that needs;
//! [`acquire`] obtains it, each step written to the [`ledger`] first;
//! [`sandbox`] boots the machine and drives the agent inside it.
//! [`config`] is the administrator's say in all of this, [`images`] the cache
//! of file-system images made from containerd's layers, [`check`] tells
//! whether this host can do any of it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

pub mod acquire;
mod agent;
pub mod changes;
pub mod check;
pub mod config;
pub mod events;
pub mod hooks;
pub mod images;
pub mod ledger;
pub mod mounted;
pub mod plan;
pub mod request;
pub mod sandbox;
mod sys;
mod virtualization;

/// Runs a process of the runtime's if this program was executed to be one, the writer of a
/// container's changes or a tool that images are made with, and then answers its exit status. A
/// virtual machine's process is a program of its own ([`config::Vm::program`]).
///
/// A program that has a [`sandbox::Sandbox`] calls this first in its `main`, before any thread
/// exists and any file is open.
pub fn child() -> Option<ExitCode> {
    changes::child().or_else(images::child)
}
