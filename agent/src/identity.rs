//! What the guest learns from the host about itself, and the host from the guest.

use std::fs::{self, File};
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
}
