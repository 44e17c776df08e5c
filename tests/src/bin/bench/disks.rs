//! Disk I/O of a guest: how fast, and what each request costs in exits and interrupts.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use supermachine_tests::disk::{CASES, Case, MARKER};

use crate::boots::reason;
use crate::machine::{Cache, Files, Vmm};
use crate::report::Report;
use crate::trace::{Point, Record, Tracer};

/// The reasons of exits that are named.
const REASONS: usize = 3;
/// The vector of Linux guests' timers (`LOCAL_TIMER_VECTOR`); every other interrupt is the disk's.
const TIMER: u32 = 236;

/// A VMM, and how it gets at the disk's file.
type Contestant<'a> = (&'a Vmm, Cache);

/// What one case came to.
#[derive(Debug, Clone, Copy)]
struct Measured {
    requests: u64,
    nanoseconds: u64,
}

impl Measured {
    /// Requests in a second.
    fn rate(self) -> f64 {
        self.requests as f64 / (self.nanoseconds as f64 / 1e9)
    }
}

/// What the requests of one case cost the guest's processor.
#[derive(Debug, Clone)]
struct Cost {
    exits: f64,
    interrupts: f64,
    /// The most frequent first.
    reasons: Vec<(String, f64)>,
}

impl Cost {
    /// `3.99 / 1.00 (npf 3.00, hlt 0.99)`.
    fn text(&self) -> String {
        let named = self.reasons.iter().take(REASONS);
        let named: Vec<_> = named
            .map(|(name, count)| format!("{name} {count:.2}"))
            .collect();
        let (exits, interrupts) = (self.exits, self.interrupts);
        format!("{exits:.2} / {interrupts:.2} ({})", named.join(", "))
    }
}

/// Measures `runs` times, each time in the other order; then once traced.
pub(crate) fn report(
    report: &mut Report,
    disks: &[Contestant<'_>],
    files: &Files,
    tracer: &Tracer,
    runs: usize,
) {
    let mut all: Vec<Vec<Vec<Measured>>> = vec![Vec::new(); disks.len()];
    for turn in 0..runs {
        let mut order: Vec<_> = disks.iter().zip(&mut all).collect();
        if turn % 2 == 1 {
            order.reverse();
        }
        for (disk, all) in order {
            all.extend(report.take(&name(*disk), measure(*disk, files)));
        }
    }
    for (place, case) in CASES.iter().enumerate() {
        let figures = all.iter().map(|runs| {
            let runs = runs.iter().filter_map(|cases| cases.get(place));
            throughput(case, runs.map(|measured| measured.rate()).collect())
        });
        report.wide(case.name, figures);
    }
    let costs: Vec<_> = disks
        .iter()
        .map(|disk| report.take(&name(*disk), costs(tracer, *disk, files)))
        .collect();
    for (place, case) in CASES.iter().enumerate() {
        let figures = costs.iter().map(|costs| {
            let cost = costs.as_ref().and_then(|costs| costs.get(place));
            cost.map_or_else(|| "—".to_owned(), Cost::text)
        });
        let name = format!("exits / interrupts of a request: {}", case.name);
        report.wide(&name, figures);
    }
}

fn name((vmm, cache): Contestant<'_>) -> String {
    format!("disk of {}, {cache:?}", vmm.name())
}

/// `123.4 MiB/s (120.0–125.0, n=5), 5678/s`: the median, and the least and the most.
fn throughput(case: &Case, mut rates: Vec<f64>) -> String {
    rates.sort_by(f64::total_cmp);
    let (Some(least), Some(most), Some(median)) =
        (rates.first(), rates.last(), rates.get(rates.len() / 2))
    else {
        return "—".to_owned();
    };
    let [low, middle, high] = [least, median, most].map(|rate| {
        let mebibytes = rate * case.block as f64 / f64::from(1 << 20);
        format!("{mebibytes:.1}")
    });
    let count = rates.len();
    format!("{middle} MiB/s ({low}–{high}, n={count}), {median:.0}/s")
}

/// Runs all cases in a guest.
fn measure((vmm, cache): Contestant<'_>, files: &Files) -> Result<Vec<Measured>> {
    let running = vmm.boot_disk(files, cache)?;
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
fn costs(tracer: &Tracer, disk: Contestant<'_>, files: &Files) -> Result<Vec<Cost>> {
    // As the local APIC takes them: how a VMM signals them makes no difference there.
    let interrupts = Point {
        name: "kvm/kvm_apic_accept_irq",
        filter: Some(format!("vec != {TIMER}")),
    };
    let points = [
        Point::all("kvm/kvm_exit"),
        Point::all("kvm/kvm_cpuid"),
        interrupts,
    ];
    let (measured, records, _) = tracer.record(&points, || measure(disk, files))?;
    (0_usize..)
        .zip(measured)
        .map(|(number, measured)| {
            let from = mark(&records, number * 2)?;
            let to = mark(&records, number * 2 + 1)?;
            Ok(cost(&records, from..to, measured.requests))
        })
        .collect()
}

fn cost(records: &[Record], time: std::ops::Range<u64>, requests: u64) -> Cost {
    let each = |count: usize| count as f64 / requests.max(1) as f64;
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut interrupts = 0;
    for record in records.iter().filter(|record| time.contains(&record.time)) {
        match record.event.as_str() {
            "kvm_exit" => *reasons.entry(reason(record)).or_default() += 1,
            "kvm_apic_accept_irq" => interrupts += 1,
            _ => {}
        }
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    Cost {
        exits: each(reasons.iter().map(|(_, count)| count).sum()),
        interrupts: each(interrupts),
        reasons: reasons
            .into_iter()
            .map(|(name, count)| (name, each(count)))
            .collect(),
    }
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
