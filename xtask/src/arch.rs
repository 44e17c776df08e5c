//! The processors we build for, and what each is called by whom.

use serde::{Deserialize, Serialize};

/// A processor architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum Arch {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

impl Default for Arch {
    fn default() -> Self {
        Self::HOST
    }
}

impl Arch {
    /// This machine's.
    pub(crate) const HOST: Self = if cfg!(target_arch = "aarch64") {
        Self::Aarch64
    } else {
        Self::X86_64
    };

    /// Whether its programs can't run on this machine.
    pub(crate) fn is_foreign(self) -> bool {
        self != Self::HOST
    }

    /// As `uname -m` and our own files name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian's packages and OCI images name it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// rustc's target. Named even for this machine, so that flags for it don't reach build scripts
    /// and macros.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// GNU's name, which the compilers' names begin with.
    pub(crate) fn gnu(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::Aarch64 => "aarch64-linux-gnu",
        }
    }

    /// Debian's package with the C compiler and linker for it on this machine.
    pub(crate) fn compiler_packages(self) -> &'static [&'static str] {
        match self {
            _ if !self.is_foreign() => &["binutils", "gcc", "libseccomp-dev", "pkg-config"],
            Self::X86_64 => &["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
            Self::Aarch64 => &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        }
    }

    /// A GNU tool for it, such as `strip`.
    pub(crate) fn tool(self, name: &str) -> String {
        if self.is_foreign() {
            format!("{}-{name}", self.gnu())
        } else {
            name.to_owned()
        }
    }

    /// A name that is `name` for this machine and says the architecture for another.
    pub(crate) fn suffixed(self, name: &str) -> String {
        if self.is_foreign() {
            format!("{name}-{}", self.name())
        } else {
            name.to_owned()
        }
    }
}
