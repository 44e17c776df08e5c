//! containerd, and whether it finds the shim.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Line, Status};

const SHIM: &str = "containerd-shim-supermachine-v2";
/// Where containerd's own plugin for additional binaries puts them.
const OPT: &str = "/opt/containerd/bin";

/// A containerd of this host.
struct Containerd {
    binary: PathBuf,
    pid: Option<u32>,
    /// Its PATH.
    path: OsString,
}

pub(super) fn lines(named: Option<PathBuf>) -> Vec<Line> {
    let own_path = std::env::var_os("PATH").unwrap_or_default();
    let found = match named {
        Some(binary) => {
            let process = running()
                .into_iter()
                .find(|process| process.binary == binary);
            vec![process.unwrap_or(Containerd {
                binary,
                pid: None,
                path: own_path,
            })]
        }
        None => {
            let mut found = running();
            if found.is_empty()
                && let Some(binary) = find("containerd", &own_path, None)
            {
                found.push(Containerd {
                    binary,
                    pid: None,
                    path: own_path,
                });
            }
            found
        }
    };
    if found.is_empty() {
        let advice = "install containerd 1.7 or later, or name its binary with --containerd";
        return vec![Line::fail(
            "containerd",
            "none runs and none is on the PATH",
            advice,
        )];
    }
    let mut lines: Vec<Line> = found
        .iter()
        .flat_map(|containerd| [version_line(containerd), shim_line(containerd)])
        .collect();
    // One containerd that can start containers is enough.
    if lines
        .iter()
        .any(|line| line.name == "shim" && line.status == Status::Ok)
    {
        for line in &mut lines {
            line.status = line.status.min(Status::Warn);
        }
    }
    lines
}

fn running() -> Vec<Containerd> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .filter_map(|entry| {
            let directory = entry.ok()?.path();
            let pid: u32 = directory.file_name()?.to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(directory.join("comm")).ok()?;
            if name.trim_end() != "containerd" {
                return None;
            }
            let binary = std::fs::read_link(directory.join("exe")).ok()?;
            let environment = std::fs::read(directory.join("environ")).ok()?;
            let path = environment
                .split(|byte| *byte == 0)
                .find_map(|variable| variable.strip_prefix(b"PATH="))
                .map(|path| OsStr::from_bytes(path).to_owned())
                .unwrap_or_default();
            Some(Containerd {
                binary,
                pid: Some(pid),
                path,
            })
        })
        .collect()
}

fn version_line(containerd: &Containerd) -> Line {
    let name = "containerd";
    let binary = containerd.binary.display();
    let output = match Command::new(&containerd.binary).arg("--version").output() {
        Ok(output) => output,
        Err(error) => {
            return Line::fail(name, format!("{binary}: {error}"), "see --containerd");
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(version) = version(&text) else {
        let found = format!("{binary} says {:?} of its version", text.trim());
        return Line::warn(name, found, "1.7 or later is needed");
    };
    let state = match containerd.pid {
        Some(pid) => format!("running as process {pid}"),
        None => "not running".to_owned(),
    };
    let found = format!("{} ({binary}), {state}", version.text);
    if (version.major, version.minor) < (1, 7) {
        Line::warn(name, found, "1.7 and later are tested")
    } else {
        Line::ok(name, found)
    }
}

pub(super) struct Version {
    pub(super) text: String,
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// From `containerd github.com/containerd/containerd/v2 2.1.9+unknown`, with or without a `v`.
pub(super) fn version(text: &str) -> Option<Version> {
    let word = text.split_whitespace().nth(2)?.trim_start_matches('v');
    let mut numbers = word.split(|c: char| !c.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some(Version {
        text: word.to_owned(),
        major,
        minor,
    })
}

fn shim_line(containerd: &Containerd) -> Line {
    let beside = containerd.binary.parent();
    match find(SHIM, &containerd.path, beside) {
        Some(shim) => Line::ok("shim", shim.display().to_string()),
        None => {
            let path = containerd.path.to_string_lossy();
            let beside = beside.unwrap_or_else(|| Path::new("/")).display();
            Line::fail(
                "shim",
                format!("containerd does not find {SHIM}"),
                format!(
                    "put it into one of the directories it looks in: {path}, {beside}, {OPT}; or \
                     name it by its absolute path as the runtime"
                ),
            )
        }
    }
}

/// An executable file `name` in `path`, then `beside`, then [`OPT`].
fn find(name: &str, path: &OsStr, beside: Option<&Path>) -> Option<PathBuf> {
    std::env::split_paths(path)
        .chain(beside.map(Path::to_path_buf))
        .chain([PathBuf::from(OPT)])
        .map(|directory| directory.join(name))
        .find(|file| {
            file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
        })
}
