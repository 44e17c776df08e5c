//! Several images on one disk: its parts become disks of their own, by a table that the host sends.

use std::collections::BTreeMap;

use supermachine_protocol::{Partition, is_disk_serial};

use crate::error::Error;

/// The most that Linux makes of one disk (DISK_MAX_PARTS).
const PARTITIONS_MAX: usize = 255;
/// What virtio-blk counts in.
const SECTOR: u64 = 512;

/// The partitions of each disk, by its serial, in the table's order.
///
/// # Errors
/// The table contradicts itself. What lies beyond a disk's end shows when the disk is found.
pub(crate) fn by_disk(table: &[Partition]) -> Result<BTreeMap<&str, Vec<&Partition>>, Error> {
    let mut disks: BTreeMap<&str, Vec<&Partition>> = BTreeMap::new();
    let mut names = BTreeMap::new();
    for partition in table {
        check(partition)?;
        let (name, disk) = (partition.name.as_str(), partition.disk.as_str());
        if names.insert(name, ()).is_some() {
            return Err(invalid(partition, "another has the same name"));
        }
        let others = disks.entry(disk).or_default();
        if others.len() == PARTITIONS_MAX {
            return Err(invalid(partition, "its disk has too many already"));
        }
        others.push(partition);
    }
    for partitions in disks.values() {
        let mut ordered = partitions.clone();
        ordered.sort_by_key(|partition| partition.offset);
        for pair in ordered.windows(2) {
            if let [first, second] = pair
                && second.offset - first.offset < first.length
            {
                return Err(invalid(second, "it overlaps another"));
            }
        }
    }
    Ok(disks)
}

/// Whether it lies on a disk of `size` bytes.
pub(crate) fn check_bounds(partition: &Partition, size: u64) -> Result<(), Error> {
    match partition.offset.checked_add(partition.length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(invalid(
            partition,
            &format!("it ends beyond its disk of {size} bytes"),
        )),
    }
}

fn check(partition: &Partition) -> Result<(), Error> {
    for name in [&partition.name, &partition.disk] {
        if !is_disk_serial(name) {
            return Err(invalid(partition, &format!("{name:?} cannot name a disk")));
        }
    }
    let whole = partition.offset.is_multiple_of(SECTOR) && partition.length.is_multiple_of(SECTOR);
    if !whole || partition.length == 0 {
        return Err(invalid(partition, "it is not whole sectors"));
    }
    check_bounds(partition, i64::MAX.unsigned_abs())
}

fn invalid(partition: &Partition, reason: &str) -> Error {
    let Partition {
        name,
        disk,
        offset,
        length,
        ..
    } = partition;
    let reason = format!("{name:?}, {length} bytes of disk {disk:?} from {offset}: {reason}");
    Error::invalid("rootfs.partitions", reason)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partition(name: &str, disk: &str, offset: u64, length: u64) -> Partition {
        let mut partition = Partition::new();
        partition.name = name.to_owned();
        partition.disk = disk.to_owned();
        (partition.offset, partition.length) = (offset, length);
        partition
    }

    #[test]
    fn a_table_is_taken_apart_by_disk() {
        let table = [
            partition("a", "x", 4096, 512),
            partition("b", "y", 0, 512),
            partition("c", "x", 0, 4096),
        ];
        let disks = by_disk(&table).unwrap();
        let names = |disk| -> Vec<&str> {
            let parts: &Vec<&Partition> = &disks[disk];
            parts.iter().map(|part| part.name.as_str()).collect()
        };
        assert_eq!(names("x"), ["a", "c"]);
        assert_eq!(names("y"), ["b"]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let good = partition("good", "x", 512, 1024);
        for (wrong, reason) in [
            (partition("good", "y", 0, 512), "same name"),
            (partition("", "x", 0, 512), "cannot name a disk"),
            (partition("a", "../x", 0, 512), "cannot name a disk"),
            (partition("a", "x", 1, 512), "whole sectors"),
            (partition("a", "x", 0, 511), "whole sectors"),
            (partition("a", "x", 0, 0), "whole sectors"),
            (partition("a", "x", 0, 1024), "overlaps"),
            (partition("a", "x", 1024, 1024), "overlaps"),
            (partition("a", "x", 512, 512), "overlaps"),
            (partition("a", "x", 1 << 63, 512), "beyond"),
            (partition("a", "x", 0_u64.wrapping_sub(512), 1024), "beyond"),
        ] {
            let error = by_disk(&[good.clone(), wrong]).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let many: Vec<_> = (0..256)
            .map(|n| partition(&n.to_string(), "x", n * 512, 512))
            .collect();
        assert!(by_disk(&many[..255]).is_ok());
        assert!(by_disk(&many).is_err());
    }

    proptest! {
        /// What is accepted lies apart, in whole sectors, and on any disk it is said to fit.
        #[test]
        fn accepted_tables_are_sound(
            rows in proptest::collection::vec(
                (0..2_u8, prop_oneof![(0..20_u64).prop_map(|n| n * 256), any::<u64>()],
                 prop_oneof![(0..20_u64).prop_map(|n| n * 256), any::<u64>()]), 0..6),
            size in any::<u64>(),
        ) {
            let table: Vec<_> = rows
                .iter()
                .enumerate()
                .map(|(at, (disk, offset, length))| {
                    partition(&format!("p{at}"), &format!("d{disk}"), *offset, *length)
                })
                .collect();
            let Ok(disks) = by_disk(&table) else { return Ok(()) };
            prop_assert_eq!(disks.values().map(Vec::len).sum::<usize>(), table.len());
            for parts in disks.values() {
                for (at, one) in parts.iter().enumerate() {
                    prop_assert!(one.offset % 512 == 0 && one.length % 512 == 0 && one.length > 0);
                    let fits = check_bounds(one, size).is_ok();
                    prop_assert_eq!(fits, u128::from(one.offset) + u128::from(one.length) <= u128::from(size));
                    for other in &parts[at + 1..] {
                        prop_assert!(one.offset + one.length <= other.offset
                            || other.offset + other.length <= one.offset);
                    }
                }
            }
        }
    }
}
