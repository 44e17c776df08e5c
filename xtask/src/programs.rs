//! Programs of the `tests` package: built static, then run where microVMs run, on this host or
//! in the lab, with the same environment.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::containerd::Version;
use crate::host::Place;
use crate::lab::Run;
use crate::{apt, build, containerd, images, lab, paths};

/// The package they are of.
pub(crate) const PACKAGE: &str = "supermachine-tests";
/// Its programs.
pub(crate) const PROGRAMS: [&str; 5] = ["bench", "demo", "e2e", "guest", "probe"];
/// The package whose examples are run as well.
pub(crate) const EXAMPLES_OF: &str = "supermachine-vmm";
/// Those examples; they are installed as `example-NAME`.
pub(crate) const EXAMPLES: [&str; 3] = ["balloon", "boot", "snapshot"];

/// What to run, where.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) arch: Arch,
    /// A file in [`folder`].
    pub(crate) program: &'a str,
    /// Its arguments; `{images}` becomes the folder with the OCI archives.
    pub(crate) args: &'a [String],
    pub(crate) containerd: Version,
    pub(crate) timeout: Option<Duration>,
    /// The longest that it may say nothing, in the lab.
    pub(crate) silence: Option<Duration>,
    /// Where what it leaves in `$SUPERMACHINE_OUT` goes.
    pub(crate) out: Option<PathBuf>,
    pub(crate) pace: lab::Pace,
    pub(crate) gic: lab::Gic,
}

/// Where the built programs are.
fn folder(arch: Arch) -> PathBuf {
    paths::products(arch).join("tests")
}

/// Puts the programs that [`build`] has built where [`launch`] finds them.
pub(crate) fn install(arch: Arch) -> Result<()> {
    let folder = folder(arch);
    paths::make_dir(&folder)?;
    for program in PROGRAMS {
        build::install_stripped(&build::built(arch, program), &folder, arch)?;
    }
    for example in EXAMPLES {
        let built = build::built(arch, "examples").join(example);
        let named = built.with_file_name(format!("example-{example}"));
        fs::copy(&built, &named).with_context(|| format!("cannot copy {}", built.display()))?;
        build::install_stripped(&named, &folder, arch)?;
    }
    install_docker_init(&folder, arch)
}

/// What `docker run --init` runs, of a package that the lab has not got.
fn install_docker_init(folder: &Path, arch: Arch) -> Result<()> {
    let init = folder.join("docker-init");
    if init.exists() {
        return Ok(());
    }
    let unpacked = tempfile::tempdir().context("no folder for a package")?;
    for deb in apt::Suite::open_for("sid", arch)?.download(&["tini-static"])? {
        apt::unpack(&deb, unpacked.path())?;
    }
    let from = unpacked.path().join("usr/bin/tini-static");
    fs::copy(&from, &init).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// Runs a program there, its output copied to `stdout`; returns its exit status.
pub(crate) fn launch(place: &Place, launch: Launch<'_>, stdout: &mut dyn Write) -> Result<u8> {
    match place {
        Place::Native => on_host(&launch, stdout),
        Place::Lab(_) => in_lab(launch, stdout),
    }
}

fn in_lab(launch: Launch<'_>, stdout: &mut dyn Write) -> Result<u8> {
    let mut command = vec![format!("/mnt/tests/{}", launch.program)];
    command.extend(
        launch
            .args
            .iter()
            .map(|arg| arg.replace("{images}", "/mnt/images")),
    );
    let env = [
        ("SUPERMACHINE_IMAGES", "/mnt/images"),
        ("SUPERMACHINE_KERNELS", "/mnt/kernels"),
        ("SUPERMACHINE_OUT", "/out"),
    ];
    lab::run_installed(
        Run {
            command,
            env: env
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .to_vec(),
            arch: launch.arch,
            add: vec![
                folder(launch.arch),
                images::ensure(launch.arch)?,
                build::kernels(launch.arch),
            ],
            out: launch.out,
            timeout: launch.timeout,
            silence: launch.silence,
            containerd: launch.containerd,
            pace: launch.pace,
            gic: launch.gic,
            ..Run::default()
        },
        stdout,
    )
}

/// On the host nothing is installed: the built binaries go before `PATH`, the configuration is
/// named by the environment, and the data goes to a folder that is removed at the end.
fn on_host(launch: &Launch<'_>, stdout: &mut dyn Write) -> Result<u8> {
    let data = tempfile::Builder::new()
        .prefix("supermachine-")
        .tempdir()
        .context("cannot make a folder for the run")?;
    let images = images::ensure(Arch::HOST)?;
    let config = data.path().join("config.toml");
    fs::write(&config, build::native_configuration(data.path())?)
        .context("cannot write the configuration")?;
    let out = launch
        .out
        .clone()
        .unwrap_or_else(|| data.path().join("out"));
    paths::make_dir(&out)?;
    let bin = containerd::binaries(launch.containerd, Arch::HOST)?;
    let ours = paths::products(Arch::HOST).join("bin");
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=60", &limit(launch.timeout)])
        .arg(folder(Arch::HOST).join(launch.program))
        .args(
            launch
                .args
                .iter()
                .map(|arg| arg.replace("{images}", &images.to_string_lossy())),
        )
        .env("PATH", containerd::search_path(&bin, &[&ours])?)
        .env("SUPERMACHINE_CONFIG", &config)
        .env("SUPERMACHINE_IMAGES", &images)
        .env("SUPERMACHINE_KERNELS", build::kernels(Arch::HOST))
        .env("SUPERMACHINE_OUT", &out)
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start timeout")?;
    let mut pipe = child.stdout.take().context("a child without output")?;
    let mut chunk = [0; 8192];
    while let Ok(count @ 1..) = pipe.read(&mut chunk) {
        stdout
            .write_all(chunk.get(..count).unwrap_or_default())
            .context("cannot write")?;
    }
    let status = child.wait().context("cannot wait for the program")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

/// As `timeout` takes it; 0 is no limit.
fn limit(timeout: Option<Duration>) -> String {
    timeout.map_or(0, |timeout| timeout.as_secs()).to_string()
}
