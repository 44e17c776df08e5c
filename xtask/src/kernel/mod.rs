//! The lean guest kernel: Debian's source package, our fragment, cached by the hash of both.

mod elf;
pub(crate) mod stock;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::step::{hash, quiet, sha256_file, step};
use crate::{apt, paths};

/// Debian's package with the source, and the one version this recipe was tried with.
const SOURCE: &str = "linux-source-6.12";
const SOURCE_VERSION: &str = "6.12.117-1~deb12u1";
const SOURCE_SHA256: &str = "e849faf31ca3555757f3a8877cb01af92122f744f75d1f3102734651c4e14703";

/// Counts changes of this recipe that change its result.
const RECIPE: &str = "1";

/// What building a kernel needs.
const TOOLS: &[&str] = &[
    "bc",
    "binutils",
    "bison",
    "flex",
    "gcc",
    "kmod",
    "libelf-dev",
    "lz4",
    "make",
    "xz-utils",
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Fetch Debian's cloud kernel of this release instead
    #[arg(long)]
    stock: bool,
    /// The processor it is for
    #[arg(long, value_enum, default_value_t)]
    arch: Arch,
}

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// Its folder, with what [`Kernel::image`] names, `config` and `bzImage` or `vmlinuz`.
    pub(crate) dir: PathBuf,
    pub(crate) arch: Arch,
    /// Debian's rather than ours: its drivers are modules.
    pub(crate) stock: bool,
}

impl Kernel {
    /// What a machine starts without decompressing anything.
    pub(crate) fn image(&self) -> PathBuf {
        self.dir.join(image_name(self.arch))
    }

    /// For people: which kernel this is.
    pub(crate) fn name(&self) -> &'static str {
        if self.stock {
            "stock Debian cloud kernel"
        } else {
            "lean kernel"
        }
    }
}

/// The file a kernel is started from: an ELF on x86, on arm64 what its boot protocol calls an Image.
fn image_name(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "vmlinux",
        Arch::Aarch64 => "Image",
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let kernel = if args.stock {
        stock::ensure(args.arch)?
    } else {
        ensure(args.arch)?
    };
    println!("{}", kernel.image().display());
    Ok(())
}

/// The lean kernel if this checkout's fragment was built before.
pub(crate) fn cached(arch: Arch) -> Result<Option<Kernel>> {
    let config = fragment(arch)?;
    let built = |sum: &str| -> Result<Option<Kernel>> {
        let kernel = Kernel {
            dir: home()?.join(key(sum, &config)),
            arch,
            stock: false,
        };
        Ok(kernel.image().exists().then_some(kernel))
    };
    if let Some(kernel) = built(SOURCE_SHA256)? {
        return Ok(Some(kernel));
    }
    // Built from the version the archive offered when the pinned one was gone.
    match fs::read_to_string(home()?.join("fallback")) {
        Ok(sum) => built(sum.trim()),
        Err(_) => Ok(None),
    }
}

/// The lean kernel, built now if the cache doesn't hold it.
pub(crate) fn ensure(arch: Arch) -> Result<Kernel> {
    let home = home()?;
    let _lock = paths::lock(&home, "build")?;
    let kernel = match cached(arch)? {
        Some(kernel) => kernel,
        None => step("guest kernel (about 25 minutes of CPU time)", || {
            build(&home, arch)
        })?,
    };
    let name = kernel
        .dir
        .file_name()
        .context("a kernel folder without a name")?;
    let current = home.join(arch.suffixed("current"));
    paths::point(&current, &name.to_string_lossy())?;
    Ok(kernel)
}

fn build(home: &Path, arch: Arch) -> Result<Kernel> {
    apt::ensure(TOOLS)?;
    apt::ensure(arch.compiler_packages())?;
    let (deb, sum) = step("kernel source", || source_package(home))?;
    let short = sum.get(..16).context("a short SHA-256")?;
    let source = home.join("source").join(short);
    step("unpack kernel source", || unpack(&deb, &source))?;

    let config = fragment(arch)?;
    let work = home.join("build").join(arch.suffixed(short));
    let make = Make {
        source: &source,
        work: &work,
        arch,
    };
    step("configure kernel", || configure(&make, &config))?;
    let (targets, results): (&[&str], &[(&str, &str)]) = match arch {
        Arch::X86_64 => (
            &["bzImage", "vmlinux"],
            &[("arch/x86/boot/bzImage", "bzImage")],
        ),
        Arch::Aarch64 => (&["Image"], &[("arch/arm64/boot/Image", "Image")]),
    };
    step("compile kernel", || make.run(targets))?;

    let fresh = tempfile::tempdir_in(home).context("cannot make a folder in the kernel cache")?;
    let to = |name: &str| fresh.path().join(name);
    if arch == Arch::X86_64 {
        quiet(
            Command::new(arch.tool("strip"))
                .arg("-s")
                .arg(work.join("vmlinux"))
                .arg("-o")
                .arg(to("vmlinux")),
        )?;
    }
    for (from, name) in results.iter().chain(&[(".config", "config")]) {
        fs::copy(work.join(from), to(name)).with_context(|| format!("cannot copy {from}"))?;
    }
    fs::write(to("source"), format!("{SOURCE} {sum}\n")).context("cannot write a note")?;
    let dir = home.join(key(&sum, &config));
    paths::remove_dir(&dir)?;
    let fresh = fresh.keep();
    fs::rename(&fresh, &dir).with_context(|| format!("cannot make {}", dir.display()))?;
    open_to_all(&dir)?;
    Ok(Kernel {
        dir,
        arch,
        stock: false,
    })
}

/// Fails if a file is no arm64 Image (Documentation/arch/arm64/booting.rst: magic at 56).
fn check_arm64_image(path: &Path) -> Result<()> {
    let image = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    anyhow::ensure!(
        image.get(56..60) == Some(b"ARM\x64"),
        "{} is no arm64 Image",
        path.display()
    );
    Ok(())
}

/// The source package: the pinned version, or with a word about it what the archive has instead.
fn source_package(home: &Path) -> Result<(PathBuf, String)> {
    let debs = home.join("debs");
    let pinned = format!("{SOURCE}={SOURCE_VERSION}");
    if let Ok(deb) = apt::download_here(&pinned, &debs) {
        let sum = sha256_file(&deb)?;
        if sum != SOURCE_SHA256 {
            let _ = fs::remove_file(&deb);
            bail!(
                "{pinned} has SHA-256 {sum}, expected {SOURCE_SHA256}: the download is damaged or \
                 the archive changed; try again, then compare with `apt-cache show {pinned}`"
            );
        }
        return Ok((deb, sum));
    }
    let (version, sum) = apt::offered(SOURCE).with_context(|| {
        format!("{SOURCE} is in no apt source here (it comes from bookworm-security); `make demo` works with the stock kernel meanwhile")
    })?;
    eprintln!(
        "    {SOURCE} {SOURCE_VERSION} is gone from the archive; building {version} instead. \
         Once tried, pin it in xtask/src/kernel/mod.rs:\n    SOURCE_VERSION {version}\n    SOURCE_SHA256 {sum}"
    );
    let deb = apt::download_here(SOURCE, &debs)?;
    let found = sha256_file(&deb)?;
    if found != sum {
        let _ = fs::remove_file(&deb);
        bail!("{SOURCE} {version} has SHA-256 {found}, apt's lists say {sum}: try again");
    }
    fs::write(home.join("fallback"), &sum).context("cannot note the kernel source's hash")?;
    Ok((deb, sum))
}

fn unpack(deb: &Path, source: &Path) -> Result<()> {
    if source.join(".complete").exists() {
        return Ok(());
    }
    paths::remove_dir(source)?;
    paths::make_dir(source)?;
    // The package holds one tar.xz: pipe it through without storing it.
    let script = format!(
        "set -o pipefail; dpkg-deb --fsys-tarfile \"$0\" | tar -xO ./usr/src/{SOURCE}.tar.xz | tar -xJ -C \"$1\" --strip-components=1"
    );
    quiet(
        Command::new("bash")
            .args(["-c", &script])
            .arg(deb)
            .arg(source),
    )?;
    fs::write(source.join(".complete"), "").context("cannot mark the kernel source")
}

/// The kernel's own build: its source, where it works, and for which processor.
struct Make<'a> {
    source: &'a Path,
    work: &'a Path,
    arch: Arch,
}

impl Make<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new("nice");
        command
            .args(["-n", "5", "make", "-C"])
            .arg(self.source)
            .arg(format!("O={}", self.work.display()))
            .arg("-s")
            // The same bytes from the same source, whoever builds.
            .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
            .env("KBUILD_BUILD_USER", "supermachine")
            .env("KBUILD_BUILD_HOST", "supermachine");
        if self.arch.is_foreign() {
            let name = match self.arch {
                Arch::X86_64 => "x86_64",
                Arch::Aarch64 => "arm64",
            };
            command.arg(format!("ARCH={name}"));
            command.arg(format!("CROSS_COMPILE={}", self.arch.tool("")));
        }
        command
    }

    fn run(&self, targets: &[&str]) -> Result<()> {
        let jobs = std::thread::available_parallelism().map_or(2, usize::from);
        quiet(self.command().arg(format!("-j{jobs}")).args(targets))
    }
}

fn configure(make: &Make<'_>, config: &str) -> Result<()> {
    paths::make_dir(make.work)?;
    let wishes = make.work.join("fragment.config");
    fs::write(&wishes, config).context("cannot write the kernel fragment")?;
    // KCONFIG_ALLCONFIG sets our wishes on top of allnoconfig, dependencies solved by Kconfig.
    quiet(
        make.command()
            .arg("allnoconfig")
            .env("KCONFIG_ALLCONFIG", &wishes),
    )?;
    let result = fs::read_to_string(make.work.join(".config")).context("no .config was made")?;
    let missing = unmet(config, &result);
    if !missing.is_empty() {
        bail!(
            "{} asks for what this kernel doesn't give (a dependency is off?):\n  {}",
            fragment_name(make.arch),
            missing.join("\n  ")
        );
    }
    Ok(())
}

/// The lines of a fragment that the finished configuration doesn't hold.
fn unmet(fragment: &str, config: &str) -> Vec<String> {
    let lines: std::collections::HashSet<&str> = config.lines().collect();
    let wish = |line: &&str| -> bool {
        if let Some(symbol) = line
            .strip_prefix("# ")
            .and_then(|rest| rest.strip_suffix(" is not set"))
        {
            return lines.iter().any(|have| {
                have.strip_prefix(symbol)
                    .is_some_and(|rest| rest.starts_with('='))
            });
        }
        line.starts_with("CONFIG_") && !lines.contains(line)
    };
    fragment.lines().filter(wish).map(str::to_owned).collect()
}

/// Where the fragment is in the checkout.
fn fragment_name(arch: Arch) -> String {
    format!("kernel/{}.config", arch.name())
}

fn fragment(arch: Arch) -> Result<String> {
    let path = paths::root().join(fragment_name(arch));
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn key(source: &str, config: &str) -> String {
    hash(&[source.as_bytes(), config.as_bytes(), RECIPE.as_bytes()])
        .chars()
        .take(16)
        .collect()
}

fn home() -> Result<PathBuf> {
    let home = paths::cache()?.join("kernel");
    paths::make_dir(&home)?;
    Ok(home)
}

/// A temporary folder is private; a cache entry is for whoever may read the cache.
fn open_to_all(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot set the mode of {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::unmet;

    #[test]
    fn names_every_wish_that_was_dropped() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=64\nCONFIG_PCI=y\n";
        let wishes = "# a group\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_N=32\n# CONFIG_PCI is not set\n# CONFIG_GONE is not set\n";
        assert_eq!(
            unmet(wishes, config),
            ["CONFIG_B=y", "CONFIG_N=32", "# CONFIG_PCI is not set"]
        );
    }
}
