//! The last steps before a container's program runs: what libcontainer leaves to its user.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::DirBuilder;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{env, fs, io};

use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::unistd::{AccessFlags, access, execve};

use super::message;
use super::privileges::Privileges;
use crate::sys;

/// Runs a container's program as runc does, with its wording of errors.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    agent: Arc<UnixStream>,
    privileges: Privileges,
    cwd: PathBuf,
    /// Make it if need be.
    make_cwd: bool,
    /// Variables that libcontainer adds.
    added: Arc<Mutex<Vec<String>>>,
}

impl Program {
    pub(crate) fn new(
        agent: UnixStream,
        privileges: Privileges,
        cwd: &Path,
        make_cwd: bool,
    ) -> Self {
        Self {
            agent: Arc::new(agent),
            privileges,
            cwd: cwd.to_owned(),
            make_cwd,
            added: Arc::default(),
        }
    }

    fn fail(&self, text: &str) {
        // The agent may be gone; then nobody asks.
        let _ = (&*self.agent).write_all(&[&[message::FAILED], text.as_bytes()].concat());
    }

    /// Goes to the working directory, with the privileges of whoever sets the container up.
    fn enter(&self) -> Result<(), String> {
        let mut entered = env::set_current_dir(&self.cwd);
        let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        if self.make_cwd && entered.as_ref().is_err_and(missing) {
            // In a mount that came over the image's files. Why not, the second try tells.
            let _ = DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&self.cwd);
            entered = env::set_current_dir(&self.cwd);
        }
        entered.map_err(|error| {
            format!(
                "chdir to cwd ({:?}) set in config.json failed: {}",
                self.cwd,
                describe(&error)
            )
        })
    }

    fn run(&self, process: &Process) -> Result<(), String> {
        let args = process.args().as_deref().unwrap_or_default();
        let path = find(process)?;
        if let Some(size) = process.console_size() {
            let columns = u16::try_from(size.width()).unwrap_or(u16::MAX);
            let rows = u16::try_from(size.height()).unwrap_or(u16::MAX);
            // Without a terminal on stdin there is nothing to set.
            let _ = sys::set_window_size(&io::stdin(), columns, rows);
        }
        let mut env = process.env().clone().unwrap_or_default();
        env.append(&mut self.added.lock().unwrap_or_else(PoisonError::into_inner));
        let args = strings(args)?;
        let env = strings(&env)?;
        let path_c = strings(&[path.to_string_lossy()])?.remove(0);

        let mut go = [0];
        let ready = (&*self.agent).write_all(&[message::READY]);
        ready
            .and_then(|()| (&*self.agent).read_exact(&mut go))
            .map_err(|e| e.to_string())?;
        self.privileges
            .filter_calls()
            .map_err(|error| format!("error installing seccomp filter: {}", describe(&error)))?;
        let Err(error) = execve(&path_c, &args, &env);
        Err(format!(
            "exec {}: {}",
            path.display(),
            describe(&error.into())
        ))
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref().ok_or_else(|| {
            ExecutorValidationError::ArgValidationError("config has no process".to_owned())
        })?;
        // The first moment that is ours; everything is set up, and the user is the process's own.
        let give_up = || {
            let dropped = self.privileges.drop_capabilities();
            dropped.map_err(|error| format!("unable to apply caps: {}", describe(&error)))
        };
        self.enter()
            .and_then(|()| give_up())
            .and_then(|()| find(process).map(drop))
            .map_err(|text| {
                self.fail(&text);
                ExecutorValidationError::ArgValidationError(text)
            })
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The program gets the config's own list, in its order; libcontainer's map is asked only
        // for what it has added to that.
        let mut added = self.added.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(home) = envs.get("HOME") {
            added.push(format!("HOME={home}"));
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        if process
            .env()
            .iter()
            .flatten()
            .any(|variable| variable.starts_with("HOME="))
        {
            self.added
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
        let Err(text) = self.run(process) else {
            return Ok(());
        };
        self.fail(&text);
        Err(ExecutorError::Other(text))
    }
}

/// Finds the program as Go's exec.LookPath does, whose words runc's users know.
fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .ok_or_else(|| "args must not be empty".to_owned())?;
    if name.contains('/') {
        let path = Path::new(name);
        return match executable(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Err(format!("exec: {name:?}: stat {name}: {}", describe(&error)))
            }
            Err(error) => Err(format!("exec: {name:?}: {}", describe(&error))),
        };
    }
    let path = process
        .env()
        .iter()
        .flatten()
        .find_map(|variable| variable.strip_prefix("PATH="));
    for directory in path.unwrap_or_default().split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        if !name.is_empty() && executable(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(format!(
        "exec: {name:?}: executable file not found in $PATH"
    ))
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // Asks for the real user, who is the effective one here.
    access(path, AccessFlags::X_OK).map_err(io::Error::from)
}

/// The kernel's words for an error, without Rust's "(os error 2)", in lower case as Go has them.
fn describe(error: &io::Error) -> String {
    let text = match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_owned(),
        None => error.to_string(),
    };
    text.to_lowercase()
}

fn strings<S: AsRef<str>>(strings: &[S]) -> Result<Vec<CString>, String> {
    strings
        .iter()
        .map(|string| CString::new(string.as_ref()))
        .collect::<Result<_, _>>()
        .map_err(|_| "arguments and environment must not contain NUL bytes".to_owned())
}

#[cfg(test)]
mod tests;
