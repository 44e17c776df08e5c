//! Prints, as one line of JSON, all that a process can see of how it was started; then, when asked
//! to `stay`, waits for a signal.
//!
//!     probe [--stay] [--sysctl NAME]… [--file PATH]… [--call]…
//!     probe --tree PATH
//!
//! It runs inside containers of different runtimes, whose lines are then compared, so nothing that
//! differs from run to run is printed as it is: ids of namespaces, mounts and devices are left out.

#![allow(clippy::print_stdout, reason = "printing is what it does")]

mod calls;
mod files;
mod sys;
mod tree;

use std::fs;
use std::io::Write;

use serde_json::{Map, Value, json};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let after = |flag: &'static str| {
        arguments
            .windows(2)
            .filter(move |pair| pair[0] == flag)
            .map(|pair| pair[1].clone())
    };
    if let Some(root) = after("--tree").next() {
        if let Err(error) = tree::print(root.as_ref(), &mut std::io::stdout().lock()) {
            println!("{root}: {error}");
            std::process::exit(1);
        }
        return;
    }
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let mut seen = process();
    seen.insert("args".into(), json!(arguments));
    seen.insert("mounts".into(), files::mounts());
    seen.insert("masked".into(), files::masked());
    seen.insert("devices".into(), files::devices());
    let read = |paths: Vec<String>, prefix: &str| -> Value {
        let read = paths.into_iter().map(|name| {
            let path = format!(
                "{prefix}{}",
                if prefix.is_empty() {
                    name.clone()
                } else {
                    name.replace('.', "/")
                }
            );
            (name, files::text(&path))
        });
        Value::Object(read.collect())
    };
    seen.insert(
        "sysctls".into(),
        read(after("--sysctl").collect(), "/proc/sys/"),
    );
    seen.insert("files".into(), read(after("--file").collect(), ""));
    if has("--calls") {
        // The last: some of them change the process.
        seen.insert("calls".into(), calls::errors());
    }
    let mut line = Value::Object(seen).to_string();
    line.push('\n');
    // Whoever reads this sees that it is cut off.
    let _ = std::io::stdout().write_all(line.as_bytes());
    if has("--stay") {
        sys::wait_for_a_signal();
    }
}

/// The process's own attributes.
fn process() -> Map<String, Value> {
    let status = status();
    let environment: Vec<String> = std::env::vars()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let seen = json!({
        "status": status,
        "limits": limits(),
        "cgroup": files::text("/proc/self/cgroup"),
        "oom_score_adj": files::text("/proc/self/oom_score_adj"),
        "personality": sys::personality(),
        "scheduler": sys::scheduler(),
        "io_priority": sys::io_priority(),
        "nice": sys::nice(),
        "affinity": sys::processors_it_may_use(),
        "securebits": sys::secure_bits(),
        "dumpable": sys::dumpable(),
        "umask": sys::umask(),
        "ids": sys::ids(),
        "session_leader": sys::is_session_leader(),
        "terminal": sys::window(),
        "names": sys::names(),
        "namespaces": files::namespaces(),
        "descriptors": files::descriptors(),
        "environment": environment,
        "cwd": std::env::current_dir().map_or_else(|error| error.to_string(), |path| path.display().to_string()),
        "signals_ignored": ignored(&status),
    });
    match seen {
        Value::Object(seen) => seen,
        _ => Map::new(),
    }
}

/// The lines of `/proc/self/status` that tell of privileges and identity.
fn status() -> Map<String, Value> {
    const TOLD: [&str; 14] = [
        "Uid",
        "Gid",
        "Groups",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "SigIgn",
        "SigBlk",
        "Umask",
    ];
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(key, _)| TOLD.contains(key))
        .map(|(key, value)| {
            let words: Vec<&str> = value.split_whitespace().collect();
            (key.to_owned(), json!(words.join(" ")))
        })
        .collect()
}

fn ignored(status: &Map<String, Value>) -> Value {
    status.get("SigIgn").cloned().unwrap_or_default()
}

fn limits() -> Map<String, Value> {
    let text = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    // "Max cpu time              unlimited            unlimited            seconds"
    let lines = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_at_checked(26));
    lines
        .map(|(name, values)| {
            let values: Vec<&str> = values.split_whitespace().take(2).collect();
            (name.trim().to_owned(), json!(values))
        })
        .collect()
}
