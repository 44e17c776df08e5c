//! Disk I/O of a guest: how fast, and what each request costs in exits and interrupts.

use anyhow::{Context, Result, ensure};
use supermachine_tests::disk::{CASES, Case, MARKER};

use crate::machine::{Files, Vmm};
use crate::trace::{Point, Record, Tracer};

/// What one case came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) requests: u64,
    pub(crate) nanoseconds: u64,
}

/// What the requests of one case cost the guest's processor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) exits: f64,
    pub(crate) interrupts: f64,
}

impl Measured {
    /// `123.4 MiB/s, 5678 requests/s`.
    pub(crate) fn text(&self, case: &Case) -> String {
        let seconds = self.nanoseconds as f64 / 1e9;
        let rate = self.requests as f64 / seconds;
        let mebibytes = rate * case.block as f64 / f64::from(1 << 20);
        format!("{mebibytes:.1} MiB/s, {rate:.0}/s")
    }
}

/// Runs all cases in a guest of this VMM.
pub(crate) fn measure(vmm: &Vmm, files: &Files) -> Result<Vec<Measured>> {
    let running = vmm.boot_disk(files)?;
    running.ended()?;
    let log = files.serial()?;
    let measured: Vec<Measured> = log
        .lines()
        .filter_map(|line| {
            // Behind the kernel's time stamp.
            let (_, said) = line.split_once("DISK ")?;
            let mut words = said.split_whitespace().skip(1);
            Some(Measured {
                requests: words.next()?.parse().ok()?,
                nanoseconds: words.next()?.parse().ok()?,
            })
        })
        .collect();
    ensure!(measured.len() == CASES.len(), "the guest said: {log}");
    Ok(measured)
}

/// The same with exits and interrupts traced.
pub(crate) fn costs(tracer: &Tracer, vmm: &Vmm, files: &Files) -> Result<Vec<Cost>> {
    let points = ["kvm/kvm_exit", "kvm/kvm_cpuid", "kvm/kvm_set_irq"].map(Point::all);
    let (measured, records, _) = tracer.record(&points, || measure(vmm, files))?;
    (0_usize..)
        .zip(measured)
        .map(|(number, measured)| {
            let from = mark(&records, number * 2)?;
            let to = mark(&records, number * 2 + 1)?;
            let count = |event: &str, text: &str| {
                let within = |record: &&Record| (from..to).contains(&record.time);
                records
                    .iter()
                    .filter(within)
                    .filter(|record| record.event == event && record.text.contains(text))
                    .count() as f64
                    / measured.requests.max(1) as f64
            };
            Ok(Cost {
                exits: count("kvm_exit", ""),
                // Of a line that is set and reset, the first.
                interrupts: count("kvm_set_irq", "level 1"),
            })
        })
        .collect()
}

/// When the guest announced something.
fn mark(records: &[Record], what: usize) -> Result<u64> {
    let leaf = format!("func {MARKER:x} idx {what:x} ");
    let hit = records
        .iter()
        .find(|record| record.event == "kvm_cpuid" && record.text.starts_with(&leaf));
    Ok(hit
        .with_context(|| format!("mark {what} was not traced"))?
        .time)
}
