//! What threads may do, as data: system calls are allowed by tables beside the code that makes them.
//! Where there is no seccomp the tables are there and say nothing.

#![cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, reason = "nothing compiles the tables")
)]

use serde::{Deserialize, Serialize};

/// What is done about a forbidden system call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// It ends the process.
    #[default]
    Enforce,
    /// The kernel logs it and lets it happen.
    Log,
    /// Nothing is filtered.
    Off,
}

impl Seccomp {
    pub(super) const ALL: [Self; 3] = [Self::Enforce, Self::Log, Self::Off];

    /// Its name in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Log => "log",
            Self::Off => "off",
        }
    }

    /// The mode of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == name)
    }
}

/// One system call that may be made.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub(super) call: libc::c_long,
    pub(super) what: What,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    Allow,
    AllowIf(&'static [When]),
    Absent,
}

/// A condition on an argument, of which the kernel compares 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The argument of this place is this value.
    Is(u8, u32),
    /// The argument of this place, under a mask, is this value.
    Masked(u8, u32, u32),
}

/// A call that is always allowed.
pub const fn allow(call: libc::c_long) -> Rule {
    let what = What::Allow;
    Rule { call, what }
}

/// A call that is allowed on one of these conditions.
pub const fn allow_if(call: libc::c_long, when: &'static [When]) -> Rule {
    let what = What::AllowIf(when);
    Rule { call, what }
}

/// A call that this kernel seems not to have (`ENOSYS`), whatever else is said of it.
pub const fn absent(call: libc::c_long) -> Rule {
    let what = What::Absent;
    Rule { call, what }
}

/// What threads of one kind may do.
#[derive(Debug, Clone, Copy)]
pub struct Filter {
    /// The kind of thread.
    pub name: &'static str,
    /// The tables that together are allowed.
    pub tables: &'static [&'static [Rule]],
}

/// The status of a process that made a forbidden call: as a shell has it for SIGSYS.
pub const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// How the line on standard error begins; a number and the thread's kind follow.
pub const REPORT: &str = "seccomp: ";
