//! What all tests stand on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Completion, Failed, Trial};
use supermachine_tests::RUNTIME;
use supermachine_tests::bundle;
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::Ctr;
use supermachine_tests::host::Host;
use supermachine_tests::shim::ShimConfig;

use crate::snapshotters::Snapshots;

/// OCI archives in the folder of images.
const BUSYBOX_ARCHIVE: &str = "busybox.tar";
const DEBIAN_ARCHIVE: &str = "debian.tar";

/// Where and on what the tests run. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) host: Host,
    /// The containerd's version, such as `2.1.9+unknown`.
    pub(crate) release: String,
    /// Files of the tests themselves; busybox's are in `busybox`.
    files: Arc<Option<tempfile::TempDir>>,
    /// The folder with the OCI archives.
    pub(crate) images: PathBuf,
    /// The containerd with all snapshotters, once a test has started it.
    pub(crate) snapshots: Arc<Mutex<Option<Snapshots>>>,
    /// How often what is about repetition repeats.
    pub(crate) runs: u32,
}

impl World {
    pub(crate) fn new(
        runtime: String,
        address: Option<PathBuf>,
        images: PathBuf,
        snapshotter: Option<String>,
        deadline: Duration,
        runs: u32,
    ) -> Result<Self> {
        let containerd = match address {
            Some(_) => None,
            None => Some(Arc::new(Containerd::start(Path::new("containerd"), &[])?)),
        };
        let address = match (&address, &containerd) {
            (Some(address), _) => address.clone(),
            (None, Some(containerd)) => containerd.address(),
            (None, None) => PathBuf::new(),
        };
        let ctr = Ctr::new("ctr", address);
        let release = release(&ctr)?;
        for archive in [BUSYBOX_ARCHIVE, DEBIAN_ARCHIVE] {
            let path = images.join(archive);
            // The second is not made for another processor; what it is for says so.
            if archive != DEBIAN_ARCHIVE || path.exists() {
                ctr.import(&path)
                    .with_context(|| format!("import {archive}"))?;
            }
        }
        let files = tempfile::Builder::new()
            .prefix("supermachine-e2e-")
            .tempdir()?;
        bundle::unpack(&images.join(BUSYBOX_ARCHIVE), &files.path().join("busybox"))?;
        Ok(Self {
            host: Host {
                ctr,
                containerd,
                runtime,
                snapshotter,
                deadline,
            },
            release,
            files: Arc::new(Some(files)),
            images,
            snapshots: Arc::default(),
            runs,
        })
    }

    /// For naming tests only.
    pub(crate) fn nowhere() -> Self {
        let host = Host {
            ctr: Ctr::new("ctr", ""),
            containerd: None,
            runtime: RUNTIME.to_owned(),
            snapshotter: None,
            deadline: Duration::ZERO,
        };
        Self {
            host,
            release: String::new(),
            files: Arc::new(None),
            images: PathBuf::new(),
            snapshots: Arc::default(),
            runs: 0,
        }
    }

    /// A folder of the tests' own, on a disk.
    pub(crate) fn files(&self) -> Result<&Path> {
        Ok(self.files.as_ref().as_ref().context("no files")?.path())
    }

    /// The unpacked busybox image.
    pub(crate) fn busybox(&self) -> Result<PathBuf> {
        Ok(self.files()?.join("busybox"))
    }

    /// How to drive the runtime's shim directly.
    pub(crate) fn shim(&self) -> Result<ShimConfig> {
        // containerd finds a runtime's binary by the last two words of its name.
        let mut words = self.host.runtime.rsplit('.');
        let (version, name) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let binary = format!("containerd-shim-{name}-{version}");
        Ok(ShimConfig {
            program: find(&binary).with_context(|| format!("{binary} is not on PATH"))?,
            wrapper: Vec::new(),
            config: std::env::var_os("SUPERMACHINE_CONFIG").map(PathBuf::from),
            deadline: self.host.deadline,
        })
    }

    /// A test on any runtime.
    pub(crate) fn test(&self, name: &str, run: fn(&Self) -> Result<()>) -> Trial {
        let world = self.clone();
        Trial::test(name, move || run(&world).map_err(failed))
    }

    /// A test of what only a VM has.
    pub(crate) fn vm_test(&self, name: &str, run: fn(&Self) -> Result<()>) -> Trial {
        self.conditional(name, run, |world| world.no_vm())
    }

    /// One with a container of the Debian image.
    pub(crate) fn debian_test(&self, name: &str, run: fn(&Self) -> Result<()>) -> Trial {
        self.conditional(name, run, |world| world.no_debian())
    }

    /// One of both.
    pub(crate) fn debian_vm_test(&self, name: &str, run: fn(&Self) -> Result<()>) -> Trial {
        self.conditional(name, run, |world| {
            world.no_vm().or_else(|| world.no_debian())
        })
    }

    fn no_vm(&self) -> Option<&'static str> {
        (!self.host.is_vm()).then_some("only in a VM")
    }

    fn no_debian(&self) -> Option<&'static str> {
        let archive = self.images.join(DEBIAN_ARCHIVE);
        (!archive.exists()).then_some("there is no image of Debian")
    }

    /// A test that is skipped where there is a reason to.
    fn conditional(
        &self,
        name: &str,
        run: fn(&Self) -> Result<()>,
        reason: fn(&Self) -> Option<&'static str>,
    ) -> Trial {
        let world = self.clone();
        Trial::ignorable_test(name, move || match reason(&world) {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => run(&world).map(|()| Completion::Completed).map_err(failed),
        })
    }
}

/// What the containerd behind this `ctr` says it is.
fn release(ctr: &Ctr) -> Result<String> {
    let said = ctr.output(["version"])?.success()?.text();
    let server = said.split_once("Server:").map(|(_, server)| server);
    let release = server.and_then(|server| {
        server
            .lines()
            .find_map(|line| line.trim().strip_prefix("Version:"))
    });
    Ok(release
        .with_context(|| format!("no version of a server in {said:?}"))?
        .trim()
        .to_owned())
}

pub(crate) fn failed(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}

pub(crate) fn find(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<()> {
    ensure!(found == expected, "found {found:?}, expected {expected:?}");
    Ok(())
}
