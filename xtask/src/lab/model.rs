//! What sets the labs of two processors apart: QEMU's machine, and what its disk holds.

use crate::arch::Arch;

/// The interrupt controller of an arm64 lab, and so of its guests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Gic {
    #[value(name = "2")]
    V2,
    #[default]
    #[value(name = "3")]
    V3,
}

/// A lab's machine for one processor.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) arch: Arch,
    /// The emulator's program, and the package that has it.
    pub(super) qemu: &'static str,
    pub(super) qemu_package: &'static str,
    /// Machine and processor, with virtualization.
    pub(super) machine: &'static str,
    pub(super) processor: &'static str,
    /// The kernel's command line.
    pub(super) command_line: &'static str,
    /// Packages on its disk beside those of all labs.
    pub(super) packages: &'static str,
    /// Those of the newest suite.
    pub(super) newer: &'static [&'static str],
}

/// Its emulated processor has SVM. Its disk has what ours is compared with: QEMU and Docker, whose
/// daemon is there, not running.
const X86_64: Model = Model {
    arch: Arch::X86_64,
    qemu: "qemu-system-x86_64",
    qemu_package: "qemu-system-x86",
    machine: "q35,hpet=off",
    processor: "EPYC-Rome",
    command_line: "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr \
        tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on apparmor=0 \
        kvm.halt_poll_ns=0",
    packages: "qemu-system-x86 seabios",
    newer: &["docker-cli", "docker.io", "runc"],
};

/// Its emulated processor starts Linux at EL2, which then has a KVM.
const AARCH64: Model = Model {
    arch: Arch::Aarch64,
    qemu: "qemu-system-aarch64",
    qemu_package: "qemu-system-arm",
    machine: "virt,virtualization=on",
    processor: "cortex-a72",
    command_line: "console=ttyAMA0 quiet loglevel=3 panic=-1 mitigations=off nokaslr \
        cryptomgr.notests apparmor=0 kvm.halt_poll_ns=0",
    packages: "",
    newer: &["runc"],
};

impl Model {
    pub(super) fn of(arch: Arch) -> &'static Self {
        match arch {
            Arch::X86_64 => &X86_64,
            Arch::Aarch64 => &AARCH64,
        }
    }

    /// What QEMU's `-machine` takes.
    pub(super) fn machine(&self, gic: Gic) -> String {
        match (self.arch, gic) {
            (Arch::X86_64, _) => self.machine.to_owned(),
            (Arch::Aarch64, Gic::V2) => format!("{},gic-version=2", self.machine),
            (Arch::Aarch64, Gic::V3) => format!("{},gic-version=3", self.machine),
        }
    }
}
