//! What a process that died unexpectedly left on its standard error.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::log;
use crate::jail::{self, SECCOMP_EXIT_STATUS, SECCOMP_REPORT};

/// As much as is read.
const MOST: u64 = 1024;

/// Reads what is there. The process has ended, but another may hold the pipe open.
pub(super) fn read(stderr: OwnedFd) -> String {
    let mut said = Vec::new();
    let nonblocking =
        fcntl_getfl(&stderr).and_then(|flags| fcntl_setfl(&stderr, flags | OFlags::NONBLOCK));
    if nonblocking.is_ok() {
        // Up to an end or an error; what came before is what there is.
        let _ = File::from(stderr).take(MOST).read_to_end(&mut said);
    }
    log::clean(String::from_utf8_lossy(&said).trim(), log::MAX_LINE)
}

/// Why a process with these last words died, if its filter of system calls ended it.
pub(super) fn forbidden(status: ExitStatus, said: &str) -> Option<String> {
    if status.signal() == Some(rustix::process::Signal::SYS.as_raw()) {
        return Some("The VMM process made a forbidden system call".to_owned());
    }
    if status.code() != Some(SECCOMP_EXIT_STATUS) {
        return None;
    }
    let (call, thread) = said.strip_prefix(SECCOMP_REPORT)?.split_once(' ')?;
    let number: usize = call.parse().ok()?;
    let name = jail::call_name(number);
    Some(format!(
        "The VMM process made system call {number} ({name}), which its seccomp filter forbids to \
         a {thread} thread"
    ))
}
