//! Debian's own cloud kernel: proves that a stock kernel boots, serves the demo before the lean
//! one is built, and runs the lab itself.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Kernel, elf, home, open_to_all};
use crate::arch::Arch;
use crate::step::{quiet, step};
use crate::{apt, paths};

/// The package that always depends on a release's newest cloud kernel, without the architecture.
const META: &str = "linux-image-cloud";

/// What a guest of ours needs that Debian builds as modules. Names found built in are skipped.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
    "virtio_rng",
    "virtio_balloon",
    "virtio_net",
    "virtiofs",
];

/// The stock kernel, fetched now if the cache doesn't hold it.
///
/// Its folder has `vmlinuz`, what [`Kernel::image`] names, `config`; `modules/` with `modules.list` (file names, one a
/// line, in load order) and the uncompressed modules for our guests; and `lib/modules/` whole.
pub(crate) fn ensure(arch: Arch) -> Result<Kernel> {
    let home = home()?;
    let link = home.join(arch.suffixed("stock"));
    if let Some(kernel) = cached(&link, arch) {
        return Ok(kernel);
    }
    let _lock = paths::lock(&home, &arch.suffixed("stock"))?;
    if let Some(kernel) = cached(&link, arch) {
        return Ok(kernel);
    }
    step("stock Debian kernel", || fetch(&home, &link, arch))?;
    cached(&link, arch).context("the stock kernel was fetched but is not there")
}

/// The folder itself, so that a later fetch can't change it under whoever uses it.
fn cached(link: &Path, arch: Arch) -> Option<Kernel> {
    let dir = fs::canonicalize(link).ok()?;
    let kernel = Kernel {
        dir,
        arch,
        stock: true,
    };
    kernel.image().exists().then_some(kernel)
}

fn fetch(home: &Path, link: &Path, arch: Arch) -> Result<()> {
    apt::ensure(&["kmod", "xz-utils"])?;
    let meta = format!("{META}-{}", arch.debian());
    let suite = apt::Suite::of_release(arch)?;
    let image = suite
        .depends(&meta)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{meta} depends on no kernel: run apt-get update"))?;
    let fresh = tempfile::tempdir_in(home).context("cannot make a folder in the kernel cache")?;
    for deb in suite.download(&[&image])? {
        apt::unpack(&deb, fresh.path())?;
    }

    let version = image.trim_start_matches("linux-image-");
    let dir = fresh.path();
    for (from, to) in [("vmlinuz", "vmlinuz"), ("config", "config")] {
        let from = dir.join(format!("boot/{from}-{version}"));
        fs::rename(&from, dir.join(to)).with_context(|| format!("no {}", from.display()))?;
    }
    for useless in ["boot", "usr/share"] {
        paths::remove_dir(&dir.join(useless))?;
    }
    if !dir.join("lib").exists() {
        fs::rename(dir.join("usr/lib"), dir.join("lib")).context("no modules in the package")?;
    }
    fs::write(dir.join("version"), format!("{version}\n")).context("cannot note the version")?;
    let (packed, plain) = (dir.join("vmlinuz"), dir.join(super::image_name(arch)));
    match arch {
        Arch::X86_64 => elf::extract(&packed, &plain)?,
        // Debian's arm64 kernels up to 6.1 are plain images.
        Arch::Aarch64 => {
            super::check_arm64_image(&packed)?;
            fs::hard_link(&packed, &plain).context("cannot name the kernel's image")?;
        }
    }
    quiet(Command::new("depmod").arg("-b").arg(dir).arg(version))?;
    let tree = dir.join("lib/modules").join(version);
    collect(&tree, GUEST_MODULES, &dir.join("modules"))?;

    let name = format!("stock-{version}");
    let place = home.join(&name);
    paths::remove_dir(&place)?;
    let fresh = fresh.keep();
    fs::rename(&fresh, &place).with_context(|| format!("cannot make {}", place.display()))?;
    open_to_all(&place)?;
    paths::point(link, &name)
}

/// Copies modules and what they depend on into `to`, with `modules.list` in load order.
pub(crate) fn collect(tree: &Path, names: &[&str], to: &Path) -> Result<()> {
    paths::make_dir(to)?;
    let mut list = String::new();
    for file in load_order(tree, names)? {
        let name = file
            .file_name()
            .context("a module without a name")?
            .to_string_lossy();
        let plain = name.trim_end_matches(".xz");
        let target = to.join(plain);
        if plain == name {
            fs::copy(&file, &target).with_context(|| format!("cannot copy {}", file.display()))?;
        } else {
            let out = crate::step::output(Command::new("xz").arg("-dc").arg(&file))?;
            fs::write(&target, out.stdout)
                .with_context(|| format!("cannot write {}", target.display()))?;
        }
        list.push_str(plain);
        list.push('\n');
    }
    fs::write(to.join("modules.list"), list).context("cannot write modules.list")
}

/// Module files in the order they must be loaded, by `modules.dep`.
fn load_order(tree: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let read = |file: &str| {
        fs::read_to_string(tree.join(file))
            .with_context(|| format!("cannot read {file} of {}", tree.display()))
    };
    let (dep, builtin) = (read("modules.dep")?, read("modules.builtin")?);
    let mut depends: HashMap<String, (&str, Vec<&str>)> = HashMap::new();
    for (path, needs) in dep.lines().filter_map(|line| line.split_once(':')) {
        depends.insert(
            module_name(path),
            (path, needs.split_whitespace().collect()),
        );
    }
    let built_in: Vec<String> = builtin.lines().map(module_name).collect();

    let mut order: Vec<&str> = Vec::new();
    for name in names.iter().map(|name| name.replace('-', "_")) {
        if built_in.contains(&name) {
            continue;
        }
        let (path, needs) = depends
            .get(&name)
            .or_else(|| depends.get(&format!("{name}_core")))
            .with_context(|| format!("the stock kernel has no module {name}"))?;
        // depmod lists what to load last first.
        for file in needs.iter().rev().chain([path]) {
            if !order.contains(file) {
                order.push(file);
            }
        }
    }
    Ok(order.into_iter().map(|file| tree.join(file)).collect())
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::module_name;

    #[test]
    fn module_names_have_neither_folder_nor_suffix_nor_dash() {
        assert_eq!(
            module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz"),
            "virtio_rng"
        );
    }
}
