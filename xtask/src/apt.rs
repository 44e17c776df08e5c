//! Debian packages by name: installed on the host, or of another suite and only unpacked.
//!
//! Mirror addresses come from the machine's own apt sources at run time; none is written here.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::paths;
use crate::step::{output, quiet, step, text};

/// Installs the packages that are missing on this machine.
pub(crate) fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|name| !installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let _lock = paths::lock(&paths::cache()?, "apt-install")?;
    step(&format!("install {list}"), || {
        root_needed(&format!("apt-get install {list}"))?;
        quiet(Command::new("apt-get").args(["update", "-qq"]))?;
        quiet(apt_install(&[]).args(&missing))
    })
}

/// Whether dpkg knows the package as installed.
pub(crate) fn installed(name: &str) -> bool {
    text(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}", name]))
        .is_ok_and(|status| status == "installed")
}

/// Debian's code name of this machine's release, such as `bookworm`.
pub(crate) fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("no VERSION_CODENAME in /etc/os-release: this needs Debian")
}

/// An apt state of its own for one suite: taking a package from it leaves the host as it was.
#[derive(Debug)]
pub(crate) struct Suite {
    name: String,
    arch: Arch,
    /// Nothing for this machine's own sources, which are as they are.
    dir: Option<PathBuf>,
}

impl Suite {
    /// Opens the state of `name`, with fresh package lists.
    pub(crate) fn open(name: &str) -> Result<Self> {
        Self::open_for(name, Arch::HOST)
    }

    /// This machine's own sources, with its security updates; for another architecture a state of
    /// the same release.
    pub(crate) fn of_release(arch: Arch) -> Result<Self> {
        let name = codename()?;
        if arch.is_foreign() {
            return Self::open_for(&name, arch);
        }
        Ok(Self {
            name,
            arch,
            dir: None,
        })
    }

    /// Opens the state of `name` with packages for `arch`.
    pub(crate) fn open_for(name: &str, arch: Arch) -> Result<Self> {
        let dir = paths::cache()?.join("apt").join(arch.suffixed(name));
        for part in ["lists/partial", "cache/archives/partial", "debs"] {
            paths::make_dir(&dir.join(part))?;
        }
        let suite = Self {
            name: name.to_owned(),
            arch,
            dir: Some(dir.clone()),
        };
        let _lock = paths::lock(&dir, "state")?;
        fs::write(dir.join("sources.list"), suite.sources()?)
            .context("cannot write a private sources.list")?;
        step(&format!("package lists of {name}"), || suite.update())?;
        Ok(suite)
    }

    fn update(&self) -> Result<()> {
        quiet(
            Command::new("apt-get")
                .args(self.options())
                .args(["update", "-qq"]),
        )
    }

    /// Lines of a sources.list for this suite. A backports suite comes with the release it extends.
    pub(crate) fn sources(&self) -> Result<String> {
        let mirror = mirror()?;
        let base = self.name.strip_suffix("-backports");
        let line = |suite: &str| {
            format!(
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main\n"
            )
        };
        Ok(base.map(&line).unwrap_or_default() + &line(&self.name))
    }

    /// Downloads packages (not their dependencies) and returns the files, in the order asked.
    pub(crate) fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => paths::cache()?.join("apt/here"),
        };
        let _lock = paths::lock(&dir, "state")?;
        packages
            .iter()
            .map(|name| download(&self.options(), name, &dir.join("debs")))
            .collect()
    }

    /// `Depends:` of a package, with fresh lists where the ones at hand don't have it.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let ask = || {
            let mut command = Command::new("apt-cache");
            command.args(self.options());
            text(command.args(["show", "--no-all-versions", package]))
        };
        let said = match ask() {
            Ok(said) if !said.is_empty() => said,
            _ => {
                self.update()?;
                ask()?
            }
        };
        let field = said
            .lines()
            .find_map(|line| line.strip_prefix("Depends:"))
            .unwrap_or_default();
        Ok(field
            .split(',')
            .filter_map(|item| item.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    /// Every version of a package the suite offers.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let mut command = Command::new("apt-cache");
        command.args(self.options()).args(["madison", package]);
        // name | version | source
        let version = |line: &str| Some(line.split('|').nth(1)?.trim().to_owned());
        Ok(text(&mut command)?.lines().filter_map(version).collect())
    }

    /// Installs packages of this suite on the host.
    pub(crate) fn install(&self, packages: &[&str]) -> Result<()> {
        let list = packages.join(" ");
        root_needed(&format!("apt-get install -t {} {list}", self.name))?;
        step(&format!("install {list} of {}", self.name), || {
            quiet(
                apt_install(&self.options())
                    .args(["-t", &self.name])
                    .args(packages),
            )
        })
    }

    fn options(&self) -> Vec<OsString> {
        let Some(dir) = &self.dir else {
            return Vec::new();
        };
        let path = |option: &str, part: &str| {
            let mut text = OsString::from(format!("-o{option}="));
            text.push(dir.join(part));
            text
        };
        let mut options = vec![
            path("Dir::State::Lists", "lists"),
            path("Dir::Etc::SourceList", "sources.list"),
            path("Dir::Cache", "cache"),
            "-oDir::Etc::SourceParts=-".into(),
            "-oAPT::Get::List-Cleanup=0".into(),
        ];
        if self.arch.is_foreign() {
            options.push(format!("-oAPT::Architecture={}", self.arch.debian()).into());
            // What is installed here is of another architecture.
            options.push("-oDir::State::status=/dev/null".into());
        }
        options
    }
}

/// Downloads a package of this machine's own sources into `dir`, unless it is there.
pub(crate) fn download_here(name: &str, dir: &Path) -> Result<PathBuf> {
    download(&[], name, dir)
}

/// Unpacks a package's files into `dir`.
pub(crate) fn unpack(deb: &Path, dir: &Path) -> Result<()> {
    paths::make_dir(dir)?;
    quiet(Command::new("dpkg-deb").arg("-x").arg(deb).arg(dir))
}

/// The version and SHA-256 the archive offers for a package now.
pub(crate) fn offered(name: &str) -> Result<(String, String)> {
    let said = text(Command::new("apt-cache").args(["show", "--no-all-versions", name]))
        .with_context(|| format!("no package {name} in this machine's apt sources"))?;
    let field = |key: &str| {
        said.lines()
            .find_map(|line| line.strip_prefix(key))
            .map(|value| value.trim().to_owned())
    };
    let version =
        field("Version:").with_context(|| format!("apt-cache names no version of {name}"))?;
    let sum = field("SHA256:").with_context(|| format!("apt-cache names no SHA256 of {name}"))?;
    Ok((version, sum))
}

fn download(options: &[OsString], name: &str, dir: &Path) -> Result<PathBuf> {
    paths::make_dir(dir)?;
    let uri = text(
        Command::new("apt-get")
            .args(options)
            .args(["download", "--print-uris", name]),
    )
    .with_context(|| format!("cannot find package {name}"))?;
    // 'address' file size hash
    let file = uri
        .split_whitespace()
        .nth(1)
        .with_context(|| format!("apt-get names no file for {name}: {uri}"))?;
    let path = dir.join(file);
    if !path.exists() {
        // Downloaded beside and moved, so that an interrupted download is never taken for whole.
        let partial = tempfile::tempdir_in(dir).context("cannot make a download folder")?;
        let mut command = Command::new("apt-get");
        command
            .args(options)
            .args(["-oAPT::Sandbox::User=root", "download", "-qq", name]);
        output(command.current_dir(partial.path()))?;
        fs::rename(partial.path().join(file), &path)
            .with_context(|| format!("apt-get did not leave {file}"))?;
    }
    Ok(path)
}

fn apt_install(options: &[OsString]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(options)
        .args([
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            "-oDPkg::Lock::Timeout=300",
        ]);
    command
}

fn root_needed(what: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this needs root: {what}");
    }
    Ok(())
}

/// The Debian mirror this machine uses for its own release.
pub(crate) fn mirror() -> Result<String> {
    let codename = codename()?;
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.filter_map(|entry| entry.ok().map(|entry| entry.path())));
    }
    files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|sources| mirror_in(&sources, &codename))
        .with_context(|| format!("no apt source of {codename} main in /etc/apt"))
}

/// The address of `codename` in one sources file, of either format.
fn mirror_in(sources: &str, codename: &str) -> Option<String> {
    let one_line = sources.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next()? == codename).then(|| uri.to_owned())
    });
    one_line.or_else(|| {
        sources.split("\n\n").find_map(|stanza| {
            let field = |key: &str| stanza.lines().find_map(|line| line.strip_prefix(key));
            let mut suites = field("Suites:")?.split_whitespace();
            let uri = field("URIs:")?.split_whitespace().next()?;
            suites
                .any(|suite| suite == codename)
                .then(|| uri.to_owned())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::mirror_in;

    #[test]
    fn finds_the_mirror_in_both_formats() {
        let deb822 = "Types: deb\n# note\nURIs: http://one.example/debian\nSuites: bookworm bookworm-updates\n\n\
                      Types: deb\nURIs: http://two.example/security\nSuites: bookworm-security\n";
        assert_eq!(
            mirror_in(deb822, "bookworm").as_deref(),
            Some("http://one.example/debian")
        );
        let line =
            "deb [arch=amd64 signed-by=/k] http://one.example/debian bookworm main contrib\n";
        assert_eq!(
            mirror_in(line, "bookworm").as_deref(),
            Some("http://one.example/debian")
        );
        assert_eq!(mirror_in(line, "trixie"), None);
    }
}
