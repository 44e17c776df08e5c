//! `delete`: cleans up after a daemon that is gone, or that containerd has given up on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use supermachine_runtime::{config, sandbox};

use crate::BoxError;
use crate::args::Args;
use crate::start::{PID_FILE, socket_of};
use crate::task::timestamp;

/// What a process looks like that was killed: 128 + SIGKILL.
const KILLED: u32 = 137;

/// Does what `delete` is for: ends the daemon if it lives, undoes what it had acquired, and tells
/// containerd how the container ended.
///
/// # Errors
/// The ledger cannot be read, or what it lists cannot be undone.
pub(crate) fn run(args: &Args) -> Result<(), BoxError> {
    end_daemon(&args.bundle.join(PID_FILE))?;
    let pid = sandbox::clean_up(&config::load(None)?, &args.namespace, &args.id)?;
    match fs::remove_file(socket_of(args)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut response = DeleteResponse::new();
    response.pid = pid.unwrap_or(0);
    response.exit_status = KILLED;
    response.exited_at = Some(timestamp(SystemTime::now())).into();
    Ok(io::stdout().write_all(&response.write_to_bytes()?)?)
}

/// Kills the daemon if it lives and waits for its end.
fn end_daemon(pid_file: &Path) -> Result<(), BoxError> {
    let file = match File::open(pid_file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    let pid: Option<i32> = fs::read_to_string(pid_file)?.trim().parse().ok();
    // Only the daemon holds the lock, so while it is held the number is the daemon's.
    let locked = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
    if let Some(target) = pid.and_then(Pid::from_raw).filter(|_| locked) {
        let _ = kill_process(target, Signal::KILL);
        flock(&file, FlockOperation::LockShared)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_daemon_that_holds_the_lock_is_killed_and_another_process_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(PID_FILE);
        let locked = File::create(&path).unwrap();
        flock(&locked, FlockOperation::NonBlockingLockExclusive).unwrap();
        let mut daemon = Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::from(locked))
            .spawn()
            .unwrap();
        let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();

        fs::write(&path, daemon.id().to_string()).unwrap();
        end_daemon(&path).unwrap();
        assert_eq!(daemon.wait().unwrap().signal(), Some(9));

        // Nobody holds the lock any more: the number may be anybody's.
        fs::write(&path, bystander.id().to_string()).unwrap();
        end_daemon(&path).unwrap();
        assert!(bystander.try_wait().unwrap().is_none());
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }

    #[test]
    fn a_container_that_never_had_a_daemon_is_fine() {
        let directory = tempfile::tempdir().unwrap();
        end_daemon(&directory.path().join(PID_FILE)).unwrap();
    }
}
