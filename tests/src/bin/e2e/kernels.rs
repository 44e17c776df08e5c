//! Guest kernels: ours in its other form, and the one that Debian ships for clouds.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::bundle::Bundle;
use supermachine_tests::sha256;
use supermachine_tests::shim::{Shim, new_id};

use crate::bad::configured;
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

/// How the release of Debian's kernel for clouds ends.
const RELEASE: &str = if cfg!(target_arch = "x86_64") {
    "-cloud-amd64"
} else {
    "-cloud-arm64"
};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("kernels::of_debian", debian),
        // arm64's kernels have one form alone.
        #[cfg(target_arch = "x86_64")]
        world.vm_test("kernels::ours_as_bzimage", bzimage),
    ]
}

/// With its drivers as modules, which the agent loads from the initramfs.
fn debian(world: &World) -> Result<()> {
    boots(
        world,
        "vmlinuz-stock",
        Some("initramfs-stock.cpio"),
        RELEASE,
    )
}

#[cfg(target_arch = "x86_64")]
fn bzimage(world: &World) -> Result<()> {
    boots(world, "bzImage", None, "-supermachine")
}

/// Whether a container on this kernel sees a release that ends so.
fn boots(world: &World, kernel: &str, initramfs: Option<&str>, release: &str) -> Result<()> {
    let dir = std::env::var_os("SUPERMACHINE_KERNELS").map(PathBuf::from);
    let dir = dir.context("SUPERMACHINE_KERNELS names no folder with kernels")?;
    let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
    let kernel = dir.join(kernel);
    let digest = sha256(&std::fs::read(&kernel).context("no such kernel")?);
    let digest = format!("\"{digest}\"");
    let kernel = quoted(kernel);
    let initramfs = initramfs.map(|name| quoted(dir.join(name)));
    let mut changes = vec![
        ("kernel", "path", kernel.as_str()),
        ("kernel", "sha256", digest.as_str()),
        ("timeouts", "boot", "\"2m\""),
    ];
    changes.extend(
        initramfs
            .as_deref()
            .map(|path| ("kernel", "initramfs", path)),
    );
    let config = configured(world, &changes)?;
    leaves_nothing(world, || {
        let id = new_id();
        let bundles = world.files()?.join("bundles");
        let script = format!("case $(uname -r) in *{release}) exit 9;; *) exit 1;; esac");
        let args = ["sh", "-c", script.as_str()];
        let bundle = Bundle::new(&bundles, &id, &world.busybox()?, &args)?;
        let shim = Shim::start(&config, &id, &bundle.dir)?;
        ensure!(shim.create(&bundle)? > 0, "no pid");
        shim.start_task()?;
        equal(shim.wait()?.exit_status, 9)?;
        shim.delete().map(drop)
    })
}
