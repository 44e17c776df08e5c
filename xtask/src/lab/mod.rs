//! The lab: a machine made by QEMU's emulation in which a stock Linux has a working KVM.
//!
//! For hosts without a KVM that runs guest kernels. `lab run` starts one, brings this build and
//! any folders into it, runs a command and carries output, exit status and results back.

mod channel;
mod files;
pub(crate) mod guest;
mod image;
mod machine;
mod model;
mod qemu;
mod session;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::channel::Request;
pub(crate) use self::machine::Pace;
use self::machine::{Lab, Shape};
pub(crate) use self::model::Gic;
use self::model::Model;
pub(crate) use self::session::Broken;
use self::session::{Load, Session};
use crate::arch::Arch;
use crate::containerd::Version;
use crate::step::{step, text};
use crate::{build, paths};

/// The socket of the lab's containerd.
pub(crate) const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// `PATH` of commands in the lab.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a containerd's programs are in the lab; boot.sh knows it too.
fn binaries(version: Version) -> &'static str {
    match version {
        Version::Newest => "/usr/bin",
        Version::Stable => "/usr/lib/containerd-1.7/bin",
    }
}

/// Where a containerd's data is in the lab; boot.sh knows it too.
fn data(version: Version) -> &'static str {
    match version {
        Version::Newest => "/var/lib/containerd",
        Version::Stable => "/var/lib/containerd-1.7",
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The lab's processor
    #[arg(long, value_enum, default_value_t, global = true)]
    arch: Arch,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Run a command in the lab: the running one, or one started for it
    Run(RunArgs),
    /// A shell in the lab
    Shell(InstallArgs),
    /// Start a lab that stays, for quick repeats
    Up {
        /// The lab's memory, as QEMU takes it
        #[arg(long, default_value = "4G")]
        memory: String,
        /// The containerd that serves in it
        #[arg(long, value_enum, default_value_t)]
        containerd: Version,
    },
    /// End the lab that `up` started
    Down,
}

#[derive(Debug, Clone, clap::Args)]
struct InstallArgs {
    /// Install nothing of this build
    #[arg(long)]
    no_install: bool,
    /// Install what target/supermachine holds, without building first
    #[arg(long)]
    no_build: bool,
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Give the command a copy of this folder as /mnt/<its name>
    #[arg(long, value_name = "DIR")]
    add: Vec<PathBuf>,
    /// End the command after this many seconds; exit status 124
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// End the command when it says nothing for so many seconds
    #[arg(long)]
    silence: Option<u64>,
    /// The lab's memory, as QEMU takes it (of a lab started for this run)
    #[arg(long)]
    memory: Option<String>,
    /// The containerd that serves in the lab; `ctr` and runc's shim are of the same version
    #[arg(long, value_enum, default_value_t)]
    containerd: Version,
    /// Copy what the command leaves in /out here
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One processor whose clock counts instructions: for figures; always a lab of its own
    #[arg(long)]
    icount: bool,
    /// The interrupt controller of an arm64 lab (of a lab started for this run)
    #[arg(long, value_enum, value_name = "VERSION")]
    gic: Option<Gic>,
    /// Start a lab for this run even if one is running
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    install: InstallArgs,
    /// The command
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A run in the lab, for the other tasks of xtask.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) arch: Arch,
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) add: Vec<PathBuf>,
    pub(crate) out: Option<PathBuf>,
    pub(crate) timeout: Option<Duration>,
    /// The longest that the command may say nothing.
    pub(crate) silence: Option<Duration>,
    pub(crate) memory: Option<String>,
    pub(crate) containerd: Version,
    pub(crate) pace: Pace,
    pub(crate) gic: Gic,
    pub(crate) fresh: bool,
}

pub(crate) fn run(args: Args) -> Result<u8> {
    let arch = args.arch;
    match args.action {
        Action::Run(args) => {
            let install = install_root(&args.install, arch)?;
            let run = Run {
                arch,
                command: args.command,
                env: Vec::new(),
                add: args.add,
                out: args.out,
                timeout: args.timeout.map(Duration::from_secs),
                silence: args.silence.map(Duration::from_secs),
                memory: args.memory,
                containerd: args.containerd,
                pace: if args.icount {
                    Pace::Counted
                } else {
                    Pace::Steady
                },
                gic: args.gic.unwrap_or_default(),
                fresh: args.fresh,
            };
            execute(run, install.as_deref(), None, &mut std::io::stdout())
        }
        Action::Shell(args) => shell(&args, arch),
        Action::Up { memory, containerd } => up(Shape {
            arch,
            memory,
            containerd,
            pace: Pace::Steady,
            gic: Gic::default(),
        })
        .map(|()| 0),
        Action::Down => down(arch).map(|()| 0),
    }
}

/// Runs a command in the lab with what `xtask build` left installed; returns its exit status.
pub(crate) fn run_installed(run: Run, stdout: &mut dyn Write) -> Result<u8> {
    let layout = build::layout(run.arch)?;
    execute(run, Some(&layout), None, stdout)
}

/// Runs a command in the lab with nothing of ours installed; returns its exit status.
pub(crate) fn run_bare(run: Run, stdout: &mut dyn Write) -> Result<u8> {
    execute(run, None, None, stdout)
}

/// Everything a lab is started from, made or fetched now where it is missing.
pub(crate) fn prepare(arch: Arch) -> Result<()> {
    let model = Model::of(arch);
    qemu::ensure(model)?;
    image::ensure(model).map(drop)
}

fn install_root(args: &InstallArgs, arch: Arch) -> Result<Option<PathBuf>> {
    if args.no_install {
        return Ok(None);
    }
    if !args.no_build {
        build::ensure(arch)?;
    }
    build::layout(arch).map(Some)
}

fn execute(
    run: Run,
    install: Option<&Path>,
    tty: Option<(u16, u16)>,
    stdout: &mut dyn Write,
) -> Result<u8> {
    let mut env = run.env;
    if run.containerd != Version::Newest {
        let path = format!("{}:{PATH}", binaries(run.containerd));
        env.push(("PATH".to_owned(), path));
    }
    let request = Request {
        argv: run.command,
        env,
        tty,
        ..Request::default()
    };
    let load = Load {
        add: run.add,
        install: install.map(Path::to_path_buf),
        out: run.out,
        timeout: run.timeout,
        silence: run.silence,
    };
    let shape = Shape {
        arch: run.arch,
        memory: run.memory.clone().unwrap_or_else(|| "4G".to_owned()),
        containerd: run.containerd,
        pace: run.pace,
        gic: run.gic,
    };
    let usual = run.pace == Pace::Steady && run.gic == Gic::default() && run.memory.is_none();
    let reuse = usual && !run.fresh;
    let staying = if reuse { running(run.arch)? } else { None };
    let staying = staying.filter(|lab| lab.containerd == run.containerd);
    let status = match staying {
        // One session at a time in the lab that stays.
        Some(lab) => {
            let _lock = paths::lock(&paths::target(), &run.arch.suffixed("lab-session"))?;
            Session::open(&lab)?.run(request, &load, stdout)?
        }
        None => {
            let own = machine::start_own(&shape)?;
            let begin = std::time::Instant::now();
            let session = Session::open(&own.lab)?;
            eprintln!("    lab started in {:.1} s", begin.elapsed().as_secs_f64());
            session.run(request, &load, stdout)?
        }
    };
    Ok(u8::try_from(status).unwrap_or(125))
}

fn shell(args: &InstallArgs, arch: Arch) -> Result<u8> {
    let install = install_root(args, arch)?;
    let stty = |args: &[&str]| {
        text(Command::new("stty").args(["-F", "/dev/tty"]).args(args))
            .context("a shell needs a terminal")
    };
    let size = stty(&["size"])?;
    let (rows, columns) = size
        .split_once(' ')
        .and_then(|(rows, columns)| Some((rows.parse().ok()?, columns.parse().ok()?)))
        .filter(|size| *size != (0, 0))
        .unwrap_or((24, 80));
    let saved = stty(&["-g"])?;
    let term = std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned());
    let run = Run {
        arch,
        command: vec!["bash".to_owned(), "-l".to_owned()],
        env: vec![("TERM".to_owned(), term)],
        ..Run::default()
    };
    stty(&["raw", "-echo"])?;
    let status = execute(
        run,
        install.as_deref(),
        Some((rows, columns)),
        &mut std::io::stdout(),
    );
    stty(&[&saved])?;
    status
}

/// Where the lab that stays is written down.
fn note(arch: Arch) -> PathBuf {
    paths::target()
        .join(arch.suffixed("lab"))
        .with_extension("json")
}

/// The lab that stays, if it runs and speaks this program's language.
fn running(arch: Arch) -> Result<Option<Lab>> {
    let Ok(text) = fs::read(note(arch)) else {
        return Ok(None);
    };
    let Ok(lab) = serde_json::from_slice::<Lab>(&text) else {
        return Ok(None);
    };
    if !lab.alive() {
        return Ok(None);
    }
    if lab.helper != machine::helper(arch)? {
        eprintln!(
            "    the running lab is of another build of xtask (`cargo xtask lab down`); starting one for this run"
        );
        return Ok(None);
    }
    Ok(Some(lab))
}

fn up(shape: Shape) -> Result<()> {
    if running(shape.arch)?.is_some() {
        eprintln!("    a lab is already up");
        return Ok(());
    }
    down(shape.arch)?;
    step("lab", || {
        let lab = machine::start_detached(&shape)?;
        let json = serde_json::to_vec(&lab).context("cannot describe the lab")?;
        paths::make_dir(&paths::target())?;
        fs::write(note(shape.arch), json).context("cannot note the lab")?;
        Session::open(&lab).map(drop)
    })
}

fn down(arch: Arch) -> Result<()> {
    let Ok(text) = fs::read(note(arch)) else {
        return Ok(());
    };
    if let Ok(lab) = serde_json::from_slice::<Lab>(&text) {
        lab.end()?;
    }
    match fs::remove_file(note(arch)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("cannot forget the lab: {error}")
        }
        _ => Ok(()),
    }
}
