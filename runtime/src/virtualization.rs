//! What kind of KVM the host has: whether a processor runs guests, or a program pretends to.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

const CPUINFO: &str = "/proc/cpuinfo";

/// A KVM that runs on processors without virtualization, by interpreting guests' kernels.
const EMULATING_MODULE: &str = "/sys/module/kvm_pvm";

/// Who runs a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Virtualization {
    /// The processor.
    Native,
    /// The processor; the host is a virtual machine itself.
    Nested,
    /// The host's kernel, one by one: why it is believed to.
    Emulated(&'static str),
}

impl Virtualization {
    /// That of this host, whether or not it has /dev/kvm.
    pub(crate) fn of_host() -> Self {
        // arm64 tells by no flag, and whoever has a hypervisor there has the processor's.
        if cfg!(target_arch = "aarch64") {
            return Self::Native;
        }
        Self::judge(&flags_of_host(), Path::new(EMULATING_MODULE).exists())
    }

    /// From the flags of a processor and whether the module is loaded.
    pub(crate) fn judge(flags: &str, emulating_module: bool) -> Self {
        if extension(flags).is_none() {
            return Self::Emulated("the processor has neither svm nor vmx in /proc/cpuinfo");
        }
        if emulating_module {
            return Self::Emulated("the kernel's module kvm_pvm is loaded");
        }
        if flags.split_whitespace().any(|flag| flag == "hypervisor") {
            return Self::Nested;
        }
        Self::Native
    }
}

/// The flags of the host's first processor; none where they can't be read.
pub(crate) fn flags_of_host() -> String {
    // Only as far as needed: the kernel makes the text as it is read, processor by processor.
    File::open(CPUINFO)
        .map(|file| first_flags(BufReader::new(file)))
        .unwrap_or_default()
}

fn first_flags(cpuinfo: impl BufRead) -> String {
    cpuinfo
        .lines()
        .map_while(Result::ok)
        .find_map(|line| {
            let (_, flags) = line.strip_prefix("flags")?.split_once(':')?;
            Some(flags.to_owned())
        })
        .unwrap_or_default()
}

/// The flag of hardware virtualization, if there is one.
pub(crate) fn extension(flags: &str) -> Option<&str> {
    flags
        .split_whitespace()
        .find(|flag| matches!(*flag, "svm" | "vmx"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let judge = Virtualization::judge;
        assert_eq!(judge("fpu vme svm", false), Virtualization::Native);
        assert_eq!(judge("fpu vmx hypervisor", false), Virtualization::Nested);
        for (flags, module) in [("fpu vmx", true), ("fpu svm_lock", false), ("", false)] {
            assert!(matches!(judge(flags, module), Virtualization::Emulated(_)));
        }
    }

    #[test]
    fn flags_are_those_of_the_first_processor() {
        let text = "processor\t: 0\nflags\t\t: fpu svm\n\nprocessor\t: 1\nflags\t\t: fpu\n";
        assert_eq!(first_flags(text.as_bytes()), " fpu svm");
        assert_eq!(first_flags(&b"processor : 0\n"[..]), "");
        assert_eq!(extension("fpu svm_lock"), None);
    }
}
