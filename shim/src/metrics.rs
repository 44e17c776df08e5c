//! A container's numbers in the messages containerd's clients know.
//!
//! There are two, one for each version of cgroups, and clients choose by the version the *host* has:
//! runc's shim sends what its own cgroup is. The numbers are always of the guest's cgroup, version 2.

use containerd_shim_protos::{cgroups::metrics as v1, cgroups_v2::metrics as v2};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use supermachine_runtime::sandbox::{IoStats, Stats};

use crate::publish::pack;

/// "No limit", as version 2 has it and as version 1's files say.
const UNLIMITED: u64 = u64::MAX;
const UNLIMITED_V1: u64 = 0x7fff_ffff_ffff_f000;

/// Which cgroups the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    V1,
    V2,
}

impl Mode {
    /// Found as containerd finds it: by what is mounted at /sys/fs/cgroup.
    pub(crate) fn of_host() -> Self {
        /// CGROUP2_SUPER_MAGIC of linux/magic.h.
        const CGROUP2: i128 = 0x6367_7270;
        match rustix::fs::statfs("/sys/fs/cgroup") {
            Ok(found) if i128::from(found.f_type) == CGROUP2 => Self::V2,
            _ => Self::V1,
        }
    }
}

/// The message for a host of this mode.
pub(crate) fn message(stats: &Stats, mode: Mode) -> Any {
    match mode {
        Mode::V1 => pack(&version_1(stats)),
        Mode::V2 => pack(&version_2(stats)),
    }
}

/// Bytes the container may use: all that its machine has, where it has no limit of its own. So runc's
/// clients show the host's memory.
fn memory_limit(stats: &Stats) -> u64 {
    match stats.memory.machine {
        0 => stats.memory.max,
        machine => stats.memory.max.min(machine),
    }
}

/// Assigns fields of the same names.
macro_rules! copied {
    ($to:ident, $from:expr, $($field:ident)*) => {{
        let from = $from;
        $($to.$field = from.$field;)*
    }};
}

fn version_2(stats: &Stats) -> v2::Metrics {
    let mut metrics = v2::Metrics::new();
    if let Some(cpu) = stats.cpu.as_ref() {
        let to = metrics.cpu.mut_or_insert_default();
        copied!(to, cpu, usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec);
    }
    if let Some(memory) = stats.memory.as_ref() {
        let to = metrics.memory.mut_or_insert_default();
        let stat = memory.stat.clone().unwrap_or_default();
        copied!(
            to, stat,
            anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp
            inactive_anon active_anon inactive_file active_file unevictable slab_reclaimable
            slab_unreclaimable pgfault pgmajfault
        );
        to.usage = memory.current;
        to.usage_limit = memory_limit(stats);
        to.max_usage = memory.peak;
        to.swap_usage = memory.swap_current;
        to.swap_limit = memory.swap_max;
        to.swap_max_usage = memory.swap_peak;
        let (to, from) = (
            metrics.memory_events.mut_or_insert_default(),
            memory.events.clone().unwrap_or_default(),
        );
        copied!(to, from, low high max oom oom_kill);
    }
    if let Some(pids) = stats.pids.as_ref() {
        let to = metrics.pids.mut_or_insert_default();
        (to.current, to.limit) = (pids.current, pids.max);
    }
    let usage = stats.io.iter().map(|disk| {
        let mut to = v2::IOEntry::new();
        copied!(to, disk, rbytes wbytes rios wios);
        (to.major, to.minor) = (disk.major.into(), disk.minor.into());
        to
    });
    metrics.io.mut_or_insert_default().usage = usage.collect();
    metrics
}

fn version_1(stats: &Stats) -> v1::Metrics {
    // Version 1 counts nanoseconds. The numbers are the guest's: a product must not wrap.
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
    let mut metrics = v1::Metrics::new();
    if let Some(cpu) = stats.cpu.as_ref() {
        let to = metrics.cpu.mut_or_insert_default();
        let usage = to.usage.mut_or_insert_default();
        usage.total = nanoseconds(cpu.usage_usec);
        usage.user = nanoseconds(cpu.user_usec);
        usage.kernel = nanoseconds(cpu.system_usec);
        // dockerd takes it for granted.
        let throttling = to.throttling.mut_or_insert_default();
        throttling.periods = cpu.nr_periods;
        throttling.throttled_periods = cpu.nr_throttled;
        throttling.throttled_time = nanoseconds(cpu.throttled_usec);
    }
    if let Some(memory) = stats.memory.as_ref() {
        metrics.memory = MessageField::some(memory_1(stats));
        let events = memory.events.clone().unwrap_or_default();
        metrics.memory_oom_control.mut_or_insert_default().oom_kill = events.oom_kill;
    }
    if let Some(pids) = stats.pids.as_ref() {
        let to = metrics.pids.mut_or_insert_default();
        // No limit is 0 there.
        let limit = if pids.max == UNLIMITED { 0 } else { pids.max };
        (to.current, to.limit) = (pids.current, limit);
    }
    let blkio = metrics.blkio.mut_or_insert_default();
    for disk in &stats.io {
        let bytes = [("Read", disk.rbytes), ("Write", disk.wbytes)];
        let requests = [("Read", disk.rios), ("Write", disk.wios)];
        let entry = |(op, value)| block_io_1(disk, op, value);
        blkio.io_service_bytes_recursive.extend(bytes.map(entry));
        blkio.io_serviced_recursive.extend(requests.map(entry));
    }
    metrics
}

fn memory_1(stats: &Stats) -> v1::MemoryStat {
    let memory = stats.memory.clone().unwrap_or_default();
    let stat = memory.stat.clone().unwrap_or_default();
    let limit = memory_limit(stats).min(UNLIMITED_V1);
    let mut to = v1::MemoryStat::new();
    (to.cache, to.total_cache) = (stat.file, stat.file);
    (to.rss, to.total_rss) = (stat.anon, stat.anon);
    (to.rss_huge, to.total_rss_huge) = (stat.anon_thp, stat.anon_thp);
    (to.mapped_file, to.total_mapped_file) = (stat.file_mapped, stat.file_mapped);
    (to.dirty, to.total_dirty) = (stat.file_dirty, stat.file_dirty);
    (to.writeback, to.total_writeback) = (stat.file_writeback, stat.file_writeback);
    (to.pg_fault, to.total_pg_fault) = (stat.pgfault, stat.pgfault);
    (to.pg_maj_fault, to.total_pg_maj_fault) = (stat.pgmajfault, stat.pgmajfault);
    (to.inactive_anon, to.total_inactive_anon) = (stat.inactive_anon, stat.inactive_anon);
    (to.active_anon, to.total_active_anon) = (stat.active_anon, stat.active_anon);
    (to.inactive_file, to.total_inactive_file) = (stat.inactive_file, stat.inactive_file);
    (to.active_file, to.total_active_file) = (stat.active_file, stat.active_file);
    (to.unevictable, to.total_unevictable) = (stat.unevictable, stat.unevictable);
    to.hierarchical_memory_limit = limit;
    let both = |a: u64, b: u64| a.saturating_add(b).min(UNLIMITED_V1);
    to.hierarchical_swap_limit = both(limit, memory.swap_max);
    let failures = memory.events.clone().unwrap_or_default().max;
    let usage = to.usage.mut_or_insert_default();
    (usage.limit, usage.usage) = (limit, memory.current);
    (usage.max, usage.failcnt) = (memory.peak, failures);
    // Memory and swap together.
    let swap = to.swap.mut_or_insert_default();
    swap.limit = both(limit, memory.swap_max);
    swap.usage = both(memory.current, memory.swap_current);
    swap.max = both(memory.peak, memory.swap_peak);
    to.kernel.mut_or_insert_default().limit = UNLIMITED_V1;
    to.kernel_tcp.mut_or_insert_default().limit = UNLIMITED_V1;
    to
}

fn block_io_1(disk: &IoStats, op: &str, value: u64) -> v1::BlkIOEntry {
    let mut entry = v1::BlkIOEntry::new();
    entry.op = op.to_owned();
    (entry.major, entry.minor) = (disk.major.into(), disk.minor.into());
    entry.value = value;
    entry
}

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::*;

    fn stats() -> Stats {
        let mut stats = Stats::new();
        let cpu = stats.cpu.mut_or_insert_default();
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec) = (30, 10, 20);
        let memory = stats.memory.mut_or_insert_default();
        (memory.current, memory.max, memory.peak) = (4096, u64::MAX, 8192);
        (memory.machine, memory.swap_max) = (1 << 28, u64::MAX);
        let stat = memory.stat.mut_or_insert_default();
        (stat.anon, stat.file, stat.inactive_file) = (1024, 2048, 512);
        memory.events.mut_or_insert_default().oom_kill = 1;
        let pids = stats.pids.mut_or_insert_default();
        (pids.current, pids.max) = (3, u64::MAX);
        let mut disk = IoStats::new();
        (disk.major, disk.minor, disk.rbytes, disk.wios) = (254, 16, 100, 2);
        stats.io.push(disk);
        stats
    }

    #[test]
    fn version_2_has_the_guests_numbers() {
        let any = message(&stats(), Mode::V2);
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.system_usec), (30, 20));
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (4096, 1 << 28)
        );
        assert_eq!(
            (metrics.memory.anon, metrics.memory.inactive_file),
            (1024, 512)
        );
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].rbytes),
            (254, 100)
        );
        assert_eq!(metrics.memory_events.oom_kill, 1);
    }

    #[test]
    fn version_1_has_them_in_its_own_units() {
        let any = message(&stats(), Mode::V1);
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 30_000);
        assert!(metrics.cpu.throttling.is_some());
        let memory = &metrics.memory;
        assert_eq!((memory.usage.usage, memory.usage.limit), (4096, 1 << 28));
        assert_eq!((memory.total_rss, memory.total_cache), (1024, 2048));
        assert_eq!(memory.swap.limit, UNLIMITED_V1);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        let written: Vec<_> = metrics.blkio.io_serviced_recursive.iter().collect();
        assert_eq!((written[1].op.as_str(), written[1].value), ("Write", 2));
        assert_eq!(metrics.memory_oom_control.oom_kill, 1);
    }

    #[test]
    fn a_guest_may_say_anything() {
        let mut stats = stats();
        stats.cpu.mut_or_insert_default().usage_usec = u64::MAX;
        let memory = stats.memory.mut_or_insert_default();
        (memory.current, memory.swap_current) = (u64::MAX, u64::MAX);
        (memory.max, memory.machine) = (u64::MAX, 0);
        for stats in [stats, Stats::new()] {
            for mode in [Mode::V1, Mode::V2] {
                assert!(!message(&stats, mode).type_url.is_empty());
            }
        }
    }
}
