//! What a container uses, read from the files of its cgroup.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use supermachine_protocol::{
    CpuStats, IoStats, MemoryEvents, MemoryStat, MemoryStats, PidsStats, StatsResponse,
};

/// Lines of `io.stat` that are told. A machine has fewer disks.
const DISKS_MAX: usize = 64;

/// Fills the fields of a message from the keys of the same names.
macro_rules! filled {
    ($message:ty, $keys:expr, $($field:ident)*) => {{
        let keys = $keys;
        let mut message = <$message>::new();
        $(message.$field = keys.get(stringify!($field)).copied().unwrap_or(0);)*
        message
    }};
}

/// The numbers of the cgroup at `directory`, in a machine with `machine` bytes of memory.
pub(crate) fn read(directory: &Path, machine: u64) -> StatsResponse {
    let text = |name: &str| fs::read_to_string(directory.join(name)).ok();
    let mut stats = StatsResponse::new();
    stats.cpu = text("cpu.stat").map(|text| cpu(&text)).into();
    stats.memory = text("memory.current")
        .map(|current| memory(&current, text, machine))
        .into();
    stats.pids = text("pids.current")
        .map(|current| {
            let mut pids = PidsStats::new();
            pids.current = number(&current);
            pids.max = text("pids.max").map_or(u64::MAX, |max| number(&max));
            pids
        })
        .into();
    stats.io = text("io.stat").map(|text| io(&text)).unwrap_or_default();
    stats
}

fn cpu(stat: &str) -> CpuStats {
    filled!(
        CpuStats, flat(stat),
        usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec
    )
}

fn memory(current: &str, text: impl Fn(&str) -> Option<String>, machine: u64) -> MemoryStats {
    let value = |name: &str, absent: u64| text(name).map_or(absent, |text| number(&text));
    let mut memory = MemoryStats::new();
    memory.current = number(current);
    memory.max = value("memory.max", u64::MAX);
    memory.peak = value("memory.peak", 0);
    memory.swap_current = value("memory.swap.current", 0);
    memory.swap_max = value("memory.swap.max", 0);
    memory.swap_peak = value("memory.swap.peak", 0);
    memory.machine = machine;
    let stat = text("memory.stat").unwrap_or_default();
    memory.stat = Some(filled!(
        MemoryStat, flat(&stat),
        anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp
        inactive_anon active_anon inactive_file active_file unevictable slab_reclaimable
        slab_unreclaimable pgfault pgmajfault
    ))
    .into();
    let events = text("memory.events").unwrap_or_default();
    memory.events = Some(filled!(
        MemoryEvents, flat(&events),
        low high max oom oom_kill
    ))
    .into();
    memory
}

/// `io.stat`: `254:0 rbytes=1 wbytes=2 …`, a line for each disk.
fn io(text: &str) -> Vec<IoStats> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let keys = words.filter_map(|word| {
            let (key, value) = word.split_once('=')?;
            Some((key, value.parse().ok()?))
        });
        let mut disk = filled!(
            IoStats, keys.collect::<HashMap<&str, u64>>(),
            rbytes wbytes rios wios
        );
        disk.major = major.parse().ok()?;
        disk.minor = minor.parse().ok()?;
        Some(disk)
    };
    text.lines().filter_map(line).take(DISKS_MAX).collect()
}

/// A file of `key value` lines.
fn flat(text: &str) -> HashMap<&str, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(key, value)| (key, number(value)))
        .collect()
}

/// A single value; "max" is the highest number there is.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 300\nuser_usec 100\nsystem_usec 200\nnice_usec 7\nnr_throttled 4\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "8192\n"),
            (
                "memory.stat",
                "anon 1024\ninactive_file 18446744073709551615\nnew_key 3\n",
            ),
            ("memory.events", "low 0\nmax 2\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "254:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n254:0\nodd\n",
            ),
        ] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let stats = read(directory.path(), 1 << 28);
        assert_eq!((stats.cpu.usage_usec, stats.cpu.user_usec), (300, 100));
        assert_eq!((stats.cpu.nr_throttled, stats.cpu.nr_periods), (4, 0));
        let memory = &stats.memory;
        assert_eq!(
            (memory.current, memory.max, memory.peak),
            (4096, u64::MAX, 8192)
        );
        assert_eq!(
            (memory.stat.anon, memory.stat.inactive_file),
            (1024, u64::MAX)
        );
        assert_eq!((memory.events.max, memory.events.oom_kill), (2, 1));
        assert_eq!(memory.machine, 1 << 28);
        assert_eq!((stats.pids.current, stats.pids.max), (3, 100));
        let disks: Vec<_> = stats
            .io
            .iter()
            .map(|d| (d.major, d.minor, d.rbytes, d.wios))
            .collect();
        assert_eq!(disks, [(254, 16, 10, 2), (254, 0, 0, 0)]);
    }

    #[test]
    fn a_controller_that_is_not_there_is_absent() {
        let directory = tempfile::tempdir().unwrap();
        let stats = read(directory.path(), 1);
        assert!(stats.cpu.is_none() && stats.memory.is_none() && stats.pids.is_none());
        assert!(stats.io.is_empty());
    }
}
