//! Running containers with libcontainer.
//!
//! libcontainer forks; that must not happen in the agent, which serves many things at once. So each
//! container and each exec'd process is made by a helper: this same program, run anew, with one
//! thread and nothing to do but that. [`run`] is the agent's half, [`helper`] the other.
//!
//! Two stream sockets lead from the agent to a helper:
//!
//! * *helper*: the helper says `P<pid>` or `E<text>`, then waits until the agent closes it. A process
//!   thus becomes the agent's child only after the agent watches it.
//! * *program*: inherited by the new process, which says `R` just before it would run its program,
//!   waits for one byte, and runs it. If that fails it says `X<text>`; if it works the socket closes.

pub(crate) mod executor;
pub(crate) mod helper;
mod privileges;
pub(crate) mod run;
pub(crate) mod seccomp;

/// First byte of a message; see the module.
mod message {
    pub(super) const PID: u8 = b'P';
    pub(super) const ERROR: u8 = b'E';
    pub(super) const READY: u8 = b'R';
    pub(super) const RUN: u8 = b'G';
    pub(super) const FAILED: u8 = b'X';
}
