//! What the guest learns from the host about itself, and the host from the guest.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use supermachine_protocol::{ConnectRequest, Event, Ready, VERSION};

use crate::sys;

/// A clock nearer than this to the host's is left alone.
const TOLERANCE: Duration = Duration::from_millis(10);

/// What [`Ready`] tells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct About {
    /// Since the kernel's start.
    pub(crate) init: Duration,
    /// Since the kernel's start.
    pub(crate) listening: Duration,
}

impl About {
    pub(crate) fn ready(&self) -> Event {
        let mut ready = Ready::new();
        ready.protocol_version = VERSION;
        ready.agent_version = env!("CARGO_PKG_VERSION").to_owned();
        ready.kernel_release = fs::read_to_string("/proc/sys/kernel/osrelease")
            .map(|text| text.trim_end().to_owned())
            .unwrap_or_default();
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        ready.init_uptime_ns = nanoseconds(self.init);
        ready.listening_uptime_ns = nanoseconds(self.listening);
        ready.cpus = std::thread::available_parallelism()
            .ok()
            .and_then(|count| u32::try_from(count.get()).ok())
            .unwrap_or(0);
        ready.memory = memory();
        let mut event = Event::new();
        event.set_ready(ready);
        event
    }
}

/// Time since the kernel's start.
pub(crate) fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// Bytes of memory the kernel sees; 0 if it doesn't say.
pub(crate) fn memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .map_or(0, |kibibytes: u64| kibibytes.saturating_mul(1024))
}

/// Takes over what the host says. What fails is logged: a guest with a wrong clock still runs.
pub(crate) fn apply(request: &ConnectRequest) {
    if !request.entropy.is_empty()
        && let Err(error) = File::options()
            .write(true)
            .open("/dev/urandom")
            .and_then(|random| sys::add_entropy(&random, &request.entropy))
    {
        tracing::warn!(%error, "cannot use the host's entropy");
    }
    if let Ok(host) = u64::try_from(request.host_time_ns)
        && host > 0
    {
        let host = Duration::from_nanos(host);
        let own = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        if own.abs_diff(host) > TOLERANCE
            && let Err(error) =
                clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(host))
        {
            tracing::warn!(%error, "cannot set the clock");
        }
    }
    if !request.hostname.is_empty()
        && let Err(error) = nix::unistd::sethostname(&request.hostname)
    {
        tracing::warn!(%error, "cannot set the host name");
    }
    if !request.machine_id.is_empty()
        && let Err(error) = set_machine_id(Path::new("/etc"), &request.machine_id)
    {
        tracing::warn!(%error, "cannot set the machine id");
    }
}

/// Writes `machine-id` to `etc` as machine-id(5) has it. Whoever reads meanwhile finds the old one or
/// the new.
fn set_machine_id(etc: &Path, id: &str) -> io::Result<()> {
    let digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if id.len() != 32 || !id.bytes().all(digit) || id.bytes().all(|byte| byte == b'0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{id:?} is not 32 lowercase hexadecimal digits, or is all 0"),
        ));
    }
    fs::create_dir_all(etc)?;
    let new = etc.join(".machine-id.new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o444)
        .open(&new)?;
    writeln!(file, "{id}")?;
    fs::rename(&new, etc.join("machine-id"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn a_machine_id_replaces_the_one_before() {
        let root = tempfile::tempdir().unwrap();
        // Made, as the guest's initramfs has none.
        let etc = root.path().join("etc");
        for id in [ID, "fedcba9876543210fedcba9876543210"] {
            set_machine_id(&etc, id).unwrap();
            let file = etc.join("machine-id");
            assert_eq!(fs::read_to_string(&file).unwrap(), format!("{id}\n"));
            let mode = file.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o444);
        }
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 1, "something is left");
    }

    #[test]
    fn what_is_no_machine_id_changes_nothing() {
        let etc = tempfile::tempdir().unwrap();
        set_machine_id(etc.path(), ID).unwrap();
        for id in [
            &ID[1..],
            "00000000000000000000000000000000",
            "0123456789ABCDEF0123456789abcdef",
            "01234567-89ab-cdef-0123-456789abcdef",
            "0123456789abcdef0123456789abcde\n",
            "0123456789abcdef0123456789abcdé",
        ] {
            let error = set_machine_id(etc.path(), id).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{id}");
        }
        let kept = fs::read_to_string(etc.path().join("machine-id")).unwrap();
        assert_eq!(kept.trim_end(), ID);
    }
}
