//! What memory of this process is its own, as Linux accounts for it; other systems don't tell.

use std::fs;

/// KiB of `len` bytes at `start` that this process has in memory, shared or not; nothing where the
/// system has no such account. Mappings must begin and end with the range.
///
/// # Panics
/// When the kernel doesn't tell.
pub fn resident_kib(start: *const u8, len: u64) -> Option<u64> {
    if cfg!(not(target_os = "linux")) {
        return None;
    }
    let start = start.addr() as u64;
    let smaps = fs::read_to_string("/proc/self/smaps").expect("Linux");
    let mut within = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, _)) = first.split_once('-') {
            let from = u64::from_str_radix(from, 16).unwrap_or(0);
            within = (start..start + len).contains(&from);
        } else if within && first == "Rss:" {
            let kib = words.next().and_then(|kib| kib.parse::<u64>().ok());
            sum += kib.expect("a number");
        }
    }
    Some(sum)
}
