//! How long a VMM takes to its guest's `/init`, where the time goes, and what it costs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::guest::{Init, MARKER};
use crate::machine::{self, Files, Running, Vmm};
use crate::trace::{Point, Record, Tracer};

/// What is traced for whoever looks for savings.
pub(crate) const PROFILED: [&str; 8] = [
    "sched/sched_process_exec",
    "sched/sched_switch",
    "raw_syscalls/sys_enter",
    "raw_syscalls/sys_exit",
    "exceptions/page_fault_user",
    "exceptions/page_fault_kernel",
    "kvm/kvm_entry",
    "kvm/kvm_exit",
];

/// One boot; times in nanoseconds from the VMM's exec.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boot {
    pub(crate) to_init: u64,
    pub(crate) to_end: u64,
}

/// One boot with its exits traced.
#[derive(Debug, Clone)]
pub(crate) struct Exits {
    /// From exec to the guest's first instruction, in nanoseconds.
    pub(crate) vmm_part: u64,
    /// From the first instruction to `/init`.
    pub(crate) total: usize,
    /// By reason, most frequent first.
    pub(crate) reasons: Vec<(String, usize)>,
}

pub(crate) fn exec() -> Point {
    Point::all("sched/sched_process_exec")
}

fn marker() -> Point {
    Point {
        name: "kvm/kvm_cpuid",
        filter: Some(format!("function == {MARKER}")),
    }
}

/// Boots once, with nothing traced but the two ends.
pub(crate) fn boot(tracer: &Tracer, vmm: &Vmm, files: &Files) -> Result<Boot> {
    let run = || {
        let running = vmm.boot(files, Init::Reset)?;
        let pid = running.pid();
        Ok((pid, running.ended()?))
    };
    let ((pid, end), records, _) = tracer.record(&[exec(), marker()], run)?;
    let start = exec_of(&records, pid)?;
    Ok(Boot {
        to_init: marker_of(&records)?.saturating_sub(start),
        to_end: end.saturating_sub(start),
    })
}

/// Boots our VMM with agent and devices once; nanoseconds from exec to the news that it is ready.
pub(crate) fn agent_ready(tracer: &Tracer, exe: &Path, files: &Files) -> Result<u64> {
    let run = || {
        let running = machine::boot_agent(exe, files)?;
        let pid = running.pid();
        let ready = running.agent_ready();
        running.kill();
        Ok((pid, ready?))
    };
    let ((pid, ready), records, _) = tracer.record(&[exec()], run)?;
    Ok(ready.saturating_sub(exec_of(&records, pid)?))
}

/// Boots once with all exits traced; the raw trace goes to `raw`.
pub(crate) fn exits(tracer: &Tracer, vmm: &Vmm, files: &Files, raw: &Path) -> Result<Exits> {
    let points = [
        "kvm/kvm_entry",
        "kvm/kvm_exit",
        "kvm/kvm_cpuid",
        "kvm/kvm_pio",
        "kvm/kvm_mmio",
    ];
    let mut points: Vec<Point> = points.map(Point::all).into();
    points.extend([exec(), Point::all("kvm/kvm_msr")]);
    let run = || {
        let running = vmm.boot(files, Init::Reset)?;
        let pid = running.pid();
        running.ended()?;
        Ok(pid)
    };
    let (pid, records, text) = tracer.record(&points, run)?;
    std::fs::write(raw, text).context("cannot keep a trace")?;
    let start = exec_of(&records, pid)?;
    let init = marker_of(&records)?;
    let entry = records
        .iter()
        .find(|record| record.event == "kvm_entry")
        .context("no entry into the guest was traced")?;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for record in records
        .iter()
        .filter(|record| record.event == "kvm_exit" && record.time < init)
    {
        *counts.entry(reason(record)).or_default() += 1;
    }
    let mut reasons: Vec<_> = counts.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    Ok(Exits {
        vmm_part: entry.time.saturating_sub(start),
        total: reasons.iter().map(|(_, count)| count).sum(),
        reasons,
    })
}

/// System calls and faults of one boot, for whoever looks for savings.
pub(crate) fn profile(tracer: &Tracer, vmm: &Vmm, files: &Files, raw: &Path) -> Result<()> {
    let run = || vmm.boot(files, Init::Reset).and_then(Running::ended);
    let (_, _, text) = tracer.record(&PROFILED.map(Point::all), run)?;
    std::fs::write(raw, text).context("cannot keep a profile")
}

pub(crate) fn exec_of(records: &[Record], pid: u32) -> Result<u64> {
    let pid = format!(" pid={pid} ");
    let hit = records
        .iter()
        .find(|record| record.event == "sched_process_exec" && record.text.contains(&pid));
    Ok(hit.context("the VMM's exec was not traced")?.time)
}

fn marker_of(records: &[Record]) -> Result<u64> {
    let leaf = format!("func {MARKER:x} ");
    let hit = records
        .iter()
        .find(|record| record.event == "kvm_cpuid" && record.text.starts_with(&leaf));
    Ok(hit.context("the guest's /init was not reached")?.time)
}

/// `vcpu 0 reason npf rip …`
pub(crate) fn reason(record: &Record) -> String {
    let mut words = record
        .text
        .split_whitespace()
        .skip_while(|word| *word != "reason");
    let name = words.nth(1).unwrap_or("unknown");
    name.trim_start_matches("EXIT_").to_lowercase()
}
