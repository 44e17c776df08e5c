//! `supermachine`: looks at what the shim would do and has done on this host.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use supermachine_runtime::config::{self, Resolved};
use supermachine_runtime::ledger::{self, Entry};
use supermachine_runtime::plan::{self, HostFacts};
use supermachine_runtime::request::{Create, Stdio};
use supermachine_runtime::{check, request};
use supermachine_vmm::snapshot::SnapshotFile;

/// Containers in microVMs of their own, under containerd.
#[derive(Parser)]
#[command(name = "supermachine", version)]
struct Arguments {
    /// Configuration file [default: $SUPERMACHINE_CONFIG, /etc/supermachine/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell whether a container could start on this host, and if not, why
    Check {
        /// The containerd to ask, instead of those that run
        #[arg(long, value_name = "PATH")]
        containerd: Option<PathBuf>,
    },
    /// Show the configuration in use
    Config {
        #[command(subcommand)]
        what: Option<ConfigCommand>,
    },
    /// List the sandboxes of this host
    Ps,
    /// Look at snapshots of VMs
    Snapshot {
        #[command(subcommand)]
        what: SnapshotCommand,
    },
    /// Show as JSON what the container of a bundle would need
    Plan {
        /// The directory that holds config.json
        bundle: PathBuf,
    },
}

#[derive(Subcommand)]
enum SnapshotCommand {
    /// Check a snapshot, its memory included, and tell what it has
    Inspect {
        /// The snapshot
        file: PathBuf,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print every key with its meaning and default
    Example,
}

/// What can go wrong, in the words of whoever found it.
type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    // `check` tries out how a machine's process would be confined.
    if let Some(code) = supermachine_runtime::child() {
        return code;
    }
    let arguments = Arguments::parse();
    match run(&arguments, &mut io::stdout().lock()) {
        Ok(code) => code,
        // Whoever read the output has seen enough.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            let _ = writeln!(io::stderr(), "supermachine: {text}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<ExitCode, Error> {
    if let Command::Config {
        what: Some(ConfigCommand::Example),
    } = &arguments.command
    {
        write!(out, "{}", config::example())?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Snapshot {
        what: SnapshotCommand::Inspect { file },
    } = &arguments.command
    {
        let snapshot = SnapshotFile::open(File::open(file)?)?;
        write!(out, "{}", snapshot.describe()?)?;
        snapshot.verify_memory()?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = config::load(arguments.config.as_deref())?;
    match &arguments.command {
        Command::Check { containerd } => {
            let report = check::run(&config, containerd.clone());
            write!(out, "{report}")?;
            return Ok(if report.can_start() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        // Done above.
        Command::Snapshot { .. } => {}
        Command::Config { .. } => write!(out, "{}", config.to_toml(false))?,
        Command::Ps => list(&config, out)?,
        Command::Plan { bundle } => print_plan(bundle, &config, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print_plan(bundle: &Path, config: &Resolved, out: &mut dyn Write) -> Result<(), Error> {
    let bundle = std::path::absolute(bundle)?;
    // Of a bundle alone neither names nor streams nor snapshot are known.
    let id = bundle
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let stdio = Stdio::new("", "", "", false)?;
    let id = id.unwrap_or_default();
    let create = Create::new("default", &id, &bundle, Vec::new(), stdio)?;
    let spec = request::load_spec(&bundle)?;
    let create = supermachine_runtime::mounted::with_root(&create, &spec)?;
    let plan = plan::plan(&create, &spec, &HostFacts::read(&create, &spec), config)?;
    writeln!(out, "{:#}", plan.to_json()?)?;
    Ok(())
}

/// One line for each sandbox's directory in the state directory.
fn list(config: &Resolved, out: &mut dyn Write) -> Result<(), Error> {
    writeln!(out, "{:<12} {:<40} {:<8} STATE", "NAMESPACE", "ID", "PID")?;
    for namespace in directories(&config.state.directory.0)? {
        for directory in directories(&namespace)? {
            let (pid, state) = sandbox_state(&directory);
            let pid = pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
            let name = |path: &Path| {
                path.file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned()
            };
            writeln!(
                out,
                "{:<12} {:<40} {pid:<8} {state}",
                name(&namespace),
                name(&directory)
            )?;
        }
    }
    Ok(())
}

fn directories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    Ok(found)
}

/// The machine's process, if it lives, and what that says of the sandbox.
fn sandbox_state(directory: &Path) -> (Option<u32>, &'static str) {
    let Ok(entries) = ledger::read(directory) else {
        return (None, "unreadable");
    };
    let machine = entries.iter().find_map(|entry| match entry {
        Entry::Child { pid, start_time } if ledger::start_time(*pid) == Some(*start_time) => {
            Some(*pid)
        }
        _ => None,
    });
    (
        machine,
        if machine.is_some() {
            "running"
        } else {
            "without a machine"
        },
    )
}
