//! `start`: makes the socket, starts the daemon that serves it, and tells containerd where it is.
//!
//! Nothing goes to stderr unless it fails: containerd reads both streams as the answer.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{FlockOperation, OFlags, flock};
use sha2::{Digest, Sha256};
use supermachine_runtime::config;

use crate::args::{Args, TTRPC_ADDRESS};
use crate::{BoxError, bootstrap};

/// Where containerd's shims have their sockets: short, since a socket's path must be.
const SOCKET_DIR: &str = "/run/containerd/s";

/// `sun_path` without its final zero; macOS has four bytes less than Linux.
const SOCKET_PATH_MAX: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

/// Holds the daemon's pid; the daemon holds a lock on it for as long as it lives.
pub(crate) const PID_FILE: &str = "shim.pid";

/// Holds the daemon's address; containerd 1.7 reads it when it is restarted.
pub(crate) const ADDRESS_FILE: &str = "address";

/// containerd's end of this fifo is its own log.
const LOG_FIFO: &str = "log";

/// Does what `start` is for.
///
/// # Errors
/// The configuration is wrong, a daemon for this id lives already, or something could not be
/// created. Nothing is left behind then.
pub(crate) fn run(args: &Args) -> Result<(), BoxError> {
    let params = bootstrap::read(args)?;
    let args = &params.args;
    // The daemon reads it again; what is wrong with it is best said here, where it is seen.
    config::load(None)?;
    let socket = socket_path(params.socket_dir.as_deref(), args);
    let listener = listen(&socket)?;
    let result = spawn(args, listener).and_then(|mut daemon| {
        let address = format!("unix://{}", socket.display());
        write_pid(&args.bundle.join(PID_FILE), daemon.id())
            .and_then(|()| write_atomically(&args.bundle.join(ADDRESS_FILE), &address))
            .and_then(|()| bootstrap::reply(&address, params.form))
            .inspect_err(|_| {
                // containerd will not know of it.
                let _ = daemon.kill();
                let _ = daemon.wait();
            })
    });
    if result.is_err() {
        let _ = fs::remove_file(&socket);
    }
    result
}

/// One socket for each container of each containerd.
fn socket_path(directory: Option<&str>, args: &Args) -> PathBuf {
    let name = Path::new(&args.address)
        .join(&args.namespace)
        .join(&args.id);
    let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(directory.unwrap_or(SOCKET_DIR)).join(hex)
}

/// The socket of a container whose daemon may be gone: as its daemon was told, or by rule.
pub(crate) fn socket_of(args: &Args) -> PathBuf {
    fs::read_to_string(args.bundle.join(ADDRESS_FILE))
        .ok()
        .and_then(|address| address.strip_prefix("unix://").map(PathBuf::from))
        .unwrap_or_else(|| socket_path(None, args))
}

fn listen(path: &Path) -> Result<UnixListener, BoxError> {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        return Err(format!(
            "Socket path {} has {length} bytes; a socket's path has at most {SOCKET_PATH_MAX}",
            path.display()
        )
        .into());
    }
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(directory)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(format!("A shim already listens on {}", path.display()).into());
            }
            // Left by a daemon that was killed.
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The daemon finds its socket as stdin, its locked pid file as stdout, and its log as stderr:
/// descriptors that need no telling.
fn spawn(args: &Args, listener: UnixListener) -> Result<Child, BoxError> {
    let pid_path = args.bundle.join(PID_FILE);
    let pid_file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&pid_path)?;
    flock(&pid_file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| format!("A shim for container {} is still running", args.id))?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("-namespace")
        .arg(&args.namespace)
        .arg("-id")
        .arg(&args.id)
        .arg("-address")
        .arg(&args.address)
        .arg("-publish-binary")
        .arg(&args.publish_binary)
        .arg("-bundle")
        .arg(&args.bundle)
        .current_dir(&args.bundle)
        .env(TTRPC_ADDRESS, &args.ttrpc_address)
        // One heap for all threads: each of glibc's others keeps 132 KiB for as long as it lives.
        .env("MALLOC_ARENA_MAX", "1")
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::from(pid_file))
        .stderr(log(&args.bundle))
        // Signals to containerd's process group are not for the daemon.
        .process_group(0);
    if args.debug {
        command.arg("-debug");
    }
    let daemon = command.spawn()?;
    adjust_oom_score(daemon.id());
    Ok(daemon)
}

/// containerd's log, if containerd reads it; writing to it never blocks.
fn log(bundle: &Path) -> Stdio {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(bundle.join(LOG_FIFO))
        .map_or_else(|_| Stdio::null(), Stdio::from)
}

/// The daemon goes before containerd does when memory is short.
fn adjust_oom_score(daemon: u32) {
    let parent = rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get());
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        // Without CAP_SYS_RESOURCE this may be refused, and that does no harm.
        let _ = fs::write(
            format!("/proc/{daemon}/oom_score_adj"),
            score.saturating_add(1).min(1000).to_string(),
        );
    }
}

/// In place, since the lock is on this file and no other.
fn write_pid(path: &Path, pid: u32) -> Result<(), BoxError> {
    let file = File::options().write(true).truncate(true).open(path)?;
    Ok(io::Write::write_all(
        &mut &file,
        pid.to_string().as_bytes(),
    )?)
}

fn write_atomically(path: &Path, text: &str) -> Result<(), BoxError> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, text)?;
    Ok(fs::rename(temporary, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;

    fn args(namespace: &str, id: &str) -> Args {
        let line = [
            "-namespace",
            namespace,
            "-id",
            id,
            "-address",
            "/c.sock",
            "start",
        ];
        Args::parse(line.into_iter().map(str::to_owned)).unwrap()
    }

    #[test]
    fn sockets_are_short_and_differ() {
        let one = socket_path(None, &args("default", "a"));
        let two = socket_path(None, &args("other", "a"));
        assert_ne!(one, two);
        assert!(one.starts_with(SOCKET_DIR));
        assert_eq!(one.file_name().unwrap().len(), 64);
        // The shorter of the systems' limits, macOS's.
        assert!(one.as_os_str().len() <= 103);
        assert!(socket_path(Some("/s"), &args("a", "b")).starts_with("/s"));
    }

    #[test]
    fn a_socket_whose_path_is_too_long_is_named() {
        let directory = format!("/tmp/{}", "d".repeat(60));
        let path = socket_path(Some(&directory), &args("default", "a"));
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains(&directory), "{error}");
        assert!(error.contains("at most 10"), "{error}");
        assert!(!Path::new(&directory).exists());
    }

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/sock");
        let first = listen(&path).unwrap();
        assert!(
            listen(&path)
                .unwrap_err()
                .to_string()
                .contains("already listens")
        );
        drop(first);
        listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
