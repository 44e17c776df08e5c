//! What a process keeps for itself while nothing happens.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// How long wake-ups are counted.
const WATCH: Duration = Duration::from_secs(5);
/// How long a process is left alone before.
const SETTLE: Duration = Duration::from_secs(3);
/// No mapping of a VMM's own is as large as the smallest guest.
const GUEST_RAM: u64 = 100 << 10;

/// Of one process, without guest RAM; sizes in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Idle {
    pub(crate) resident: u64,
    pub(crate) proportional: u64,
    pub(crate) private_dirty: u64,
    /// Context switches of all threads, per second.
    pub(crate) wakeups: f64,
    pub(crate) threads: usize,
}

/// Watches processes that should have nothing to do.
pub(crate) fn watch(pids: &[u32]) -> Result<Vec<Idle>> {
    thread::sleep(SETTLE);
    let before = pids
        .iter()
        .map(|pid| switches(*pid))
        .collect::<Result<Vec<_>>>()?;
    thread::sleep(WATCH);
    pids.iter()
        .zip(before)
        .map(|(pid, (earlier, _))| {
            let (later, threads) = switches(*pid)?;
            let mut idle = memory(*pid)?;
            idle.wakeups = later.saturating_sub(earlier) as f64 / WATCH.as_secs_f64();
            idle.threads = threads;
            Ok(idle)
        })
        .collect()
}

/// KiB that a process has for itself after a while, all mappings included.
pub(crate) fn all_private(pid: u32) -> Result<u64> {
    thread::sleep(SETTLE);
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("no smaps")?;
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no private memory")?.parse()?)
}

/// Context switches of all threads so far, and their number.
fn switches(pid: u32) -> Result<(u64, usize)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).context("the process is gone")?;
    let (mut sum, mut threads) = (0, 0);
    for task in tasks.flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
        sum += counts
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum::<u64>();
        threads += 1;
    }
    Ok((sum, threads))
}

/// Sums smaps over all mappings but guest RAM: a large one offered for huge pages.
fn memory(pid: u32) -> Result<Idle> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("no smaps")?;
    let mut all = Idle::default();
    let mut one = (Idle::default(), 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let value = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match key {
            "Size:" => one = (Idle::default(), value),
            "Rss:" => one.0.resident = value,
            "Pss:" => one.0.proportional = value,
            "Private_Dirty:" => one.0.private_dirty = value,
            // The last line of a mapping; `hg` is MADV_HUGEPAGE.
            "VmFlags:" => {
                let (mapping, size) = one;
                let guest = size >= GUEST_RAM && line.split_whitespace().any(|flag| flag == "hg");
                if !guest {
                    all.resident += mapping.resident;
                    all.proportional += mapping.proportional;
                    all.private_dirty += mapping.private_dirty;
                }
            }
            _ => {}
        }
    }
    Ok(all)
}

/// The process that started `pid`.
pub(crate) fn parent(pid: u32) -> Result<u32> {
    let status =
        fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
        .context("a process without a parent")
}
