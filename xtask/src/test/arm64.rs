//! Tests of arm64: cross-built, then run in the arm64 lab as they would be on such a machine. First
//! each crate's own, then containers under containerd there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::total::Total;
use super::{Tee, conclude, e2e};
use crate::arch::Arch;
use crate::lab::{self, Gic, Run};
use crate::step::{output, step};
use crate::{build, cross, kernel, paths};

const ARCH: Arch = Arch::Aarch64;

/// What of ours runs on arm64, each with its tests.
const PACKAGES: [&str; 3] = [
    "supermachine-agent",
    "supermachine-protocol",
    "supermachine-vmm",
];

/// Linux on the backend for macOS. Built apart: in one build its VMM would be everyone's.
const HVF: &str = "hvf-on-kvm";
const HVF_FEATURES: [&str; 2] = ["--features", "linux"];
/// Where it finds the guest that it boots.
const GUEST: &str = "SUPERMACHINE_GUEST";

/// All of it, in the lab on two slow processors.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// The end-to-end tests that are run there: containers, also on Debian's kernel, and the VMM alone
/// with a Linux guest.
const CONTAINERS: [&str; 2] = ["output::", "kernels::"];
const MACHINES: [&str; 3] = ["examples::", "slots::", "clones::"];

/// What depends on the interrupt controller is run once more where there is a GICv2: tests of the
/// VMM, and a guest of two vCPUs.
const OF_THE_GIC: &str = "hypervisor::kvm::";
const GUEST_OF_THE_GIC: &str = "examples::snapshot";

/// Runs each program of a folder with these arguments, the next also after one that failed.
const EACH: &str = "status=0; for program in /mnt/tests-arm64/*; do \
    echo \"$program\"; \"$program\" \"$@\" || status=1; done; exit $status";

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Only tests of this package
    #[arg(long, conflicts_with = "e2e")]
    package: Option<String>,
    /// Only end-to-end tests whose name contains this
    #[arg(long)]
    e2e: Option<String>,
    /// The lab's interrupt controller
    #[arg(long, value_enum, value_name = "VERSION", default_value_t)]
    gic: Gic,
    /// Only tests of the package whose name contains this
    #[arg(requires = "package")]
    filter: Option<String>,
}

/// Runs them and prints the total.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let mut total = Total::default();
    // Those who want the examples as well wait for the kernel; `make test` takes what is there.
    if args.package.is_none() && args.e2e.is_none() {
        kernel::ensure(ARCH)?;
    }
    counted(args, &mut total);
    Ok(conclude(&total, ""))
}

/// Runs them and adds up what they report; that they could not be run is a failure too.
pub(super) fn counted(args: &Args, total: &mut Total) {
    if let Err(error) = step("arm64", || in_lab(args, total)) {
        eprintln!("xtask: {error:#}");
        total.fail("arm64", format!("{error:#}"));
    }
}

fn in_lab(args: &Args, total: &mut Total) -> Result<()> {
    lab::prepare(ARCH)?;
    if let Some(filter) = &args.e2e {
        build::ensure(ARCH)?;
        return end_to_end(filter, args.gic, total);
    }
    units(args, total)?;
    if args.package.is_none() {
        for group in CONTAINERS {
            end_to_end(group, args.gic, total)?;
        }
        if kernel::cached(ARCH)?.is_some() {
            for group in MACHINES {
                end_to_end(group, args.gic, total)?;
            }
            end_to_end(GUEST_OF_THE_GIC, Gic::V2, total)?;
        } else {
            for group in MACHINES.iter().chain([&GUEST_OF_THE_GIC]) {
                eprintln!("    {group} skipped: `make test-arm64` builds the kernel they are for");
                total.skipped += 1;
            }
        }
    }
    Ok(())
}

fn end_to_end(filter: &str, gic: Gic, total: &mut Total) -> Result<()> {
    let report = step(&format!("{}: {filter} in the lab", name(gic)), || {
        e2e::in_lab(ARCH, gic, filter)
    })?;
    total.add(report.total, Some(name(gic)));
    Ok(())
}

/// What the place where they run is called.
fn name(gic: Gic) -> &'static str {
    match gic {
        Gic::V2 => "arm64, GICv2",
        Gic::V3 => "arm64",
    }
}

fn units(args: &Args, total: &mut Total) -> Result<()> {
    let folder = step("arm64: test programs", || programs(args))?;
    let guest = guest(args)?;
    let units = Units { folder, guest };
    units.count(args.gic, args.filter.as_deref(), total)?;
    if args.package.is_none() {
        units.count(Gic::V2, Some(OF_THE_GIC), total)?;
    }
    Ok(())
}

/// Test programs, and what they boot.
struct Units {
    folder: PathBuf,
    guest: Option<PathBuf>,
}

impl Units {
    /// Runs them and adds up what they report; a few that failed run again.
    fn count(&self, gic: Gic, filter: Option<&str>, total: &mut Total) -> Result<()> {
        let mut counted = Total::default();
        self.run(gic, &Vec::from_iter(filter), &mut counted)?;
        for name in counted.try_again() {
            eprintln!("    failed, and runs again: {name}");
            self.run(gic, &[&name, "--exact"], &mut counted)?;
        }
        counted.settle();
        total.add(counted, Some(name(gic)));
        Ok(())
    }

    fn run(&self, gic: Gic, args: &[&str], counted: &mut Total) -> Result<()> {
        let guest = self.guest.as_deref().and_then(Path::file_name);
        let run = Run {
            arch: ARCH,
            gic,
            command: ["sh", "-c", EACH, "sh"]
                .iter()
                .chain(args)
                .map(|arg| (*arg).to_owned())
                .collect(),
            env: guest
                .map(|name| (GUEST.to_owned(), format!("/mnt/{}", name.display())))
                .into_iter()
                .collect(),
            add: [&self.folder]
                .into_iter()
                .chain(&self.guest)
                .cloned()
                .collect(),
            timeout: Some(LIMIT),
            ..Run::default()
        };
        let mut tee = Tee::default();
        let name = format!("{}: tests in the lab", name(gic));
        let status = step(&name, || lab::run_bare(run, &mut tee))?;
        tee.add_to(counted, &name, status == 0);
        Ok(())
    }
}

/// Builds every test program and puts them in a folder.
fn programs(args: &Args) -> Result<PathBuf> {
    let folder = paths::products(ARCH).join("tests-arm64");
    paths::remove_dir(&folder)?;
    paths::make_dir(&folder)?;
    match args.package.as_deref() {
        None => {
            compile(&PACKAGES, &[], &folder)?;
            compile(&[HVF], &HVF_FEATURES, &folder)?;
        }
        Some(HVF) => compile(&[HVF], &HVF_FEATURES, &folder)?,
        Some(package) => compile(&[package], &[], &folder)?,
    }
    Ok(folder)
}

fn compile(packages: &[&str], more: &[&str], folder: &Path) -> Result<()> {
    let mut command = cross::cargo("test", ARCH)?;
    command.args(packages.iter().flat_map(|package| ["-p", package]));
    command.args(more);
    command.args(["--no-run", "--message-format=json"]);
    let said = String::from_utf8_lossy(&output(&mut command)?.stdout).into_owned();
    for program in said.lines().filter_map(executable) {
        build::install_stripped(Path::new(&program), folder, ARCH)?;
    }
    Ok(())
}

/// The folder with the guest's kernel and initramfs for those who boot it: alone, or of all that is
/// built for later.
fn guest(args: &Args) -> Result<Option<PathBuf>> {
    match args.package.as_deref() {
        None => {
            build::ensure(ARCH)?;
            build::installed_guest(ARCH).map(Some)
        }
        Some(HVF) => build::guest(&build::best_kernel(ARCH)?).map(Some),
        Some(_) => Ok(None),
    }
}

/// The test program that a message of cargo's is about.
fn executable(message: &str) -> Option<String> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    message.pointer("/profile/test")?.as_bool()?.then_some(())?;
    Some(message.get("executable")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::executable;

    #[test]
    fn only_test_programs_are_run() {
        let message = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        assert_eq!(
            executable(&message(true, r#""/t/a-1""#)).as_deref(),
            Some("/t/a-1")
        );
        assert_eq!(executable(&message(false, r#""/t/a""#)), None);
        assert_eq!(executable(&message(true, "null")), None);
        assert_eq!(executable("   Compiling a v0.1.0"), None);
    }
}
