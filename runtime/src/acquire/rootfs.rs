//! The disks of a root file system.

use std::fs::File;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use supermachine_protocol::Partition;
use supermachine_vmm::devices::virtio::block::concat::ALIGNMENT;

use super::AcquiredDisk;
use crate::images::{self, Cache, Error};
use crate::plan::{Disk, Image, NamedImage, Source};

/// Opens or makes each disk. Nothing of them needs an entry in the ledger: images belong to the
/// cache or the snapshotter, and a machine's own disks have no name.
pub(super) fn disks(disks: &[Disk], cache: &Cache) -> Result<Vec<AcquiredDisk>, Error> {
    let acquire = |disk: &Disk| {
        let (files, partitions) = match &disk.source {
            Source::Image(wanted) => (vec![image(wanted, cache)?], Vec::new()),
            Source::Images(wanted) => partitioned(&disk.serial, wanted, cache)?,
            Source::Writable { size } => (vec![cache.writable(*size)?], Vec::new()),
            Source::Own { file, make } => {
                let own = images::own_disk(file, make.as_ref(), disk.read_only)?;
                (vec![own], Vec::new())
            }
        };
        Ok(AcquiredDisk {
            files,
            partitions,
            serial: disk.serial.clone(),
            read_only: disk.read_only,
        })
    };
    disks.iter().map(acquire).collect()
}

fn image(image: &Image, cache: &Cache) -> Result<File, Error> {
    match image {
        Image::Layer { directory } => cache.layer(directory),
        Image::MergedLayers { directories } => cache.merged(directories),
        Image::Copy { directory } => cache.copy(directory),
        Image::File { file } => images::own_image(file),
    }
}

/// Images one after the other, and where each lies on their disk: as the VMM puts them.
fn partitioned(
    serial: &str,
    wanted: &[NamedImage],
    cache: &Cache,
) -> Result<(Vec<File>, Vec<Partition>), Error> {
    let files = all_images(wanted, cache)?;
    let mut partitions = Vec::with_capacity(files.len());
    let mut offset = 0_u64;
    for (NamedImage { name, .. }, file) in wanted.iter().zip(&files) {
        let size = images::size(file)?;
        let mut partition = Partition::new();
        partition.name.clone_from(name);
        serial.clone_into(&mut partition.disk);
        (partition.offset, partition.length) = (offset, size.next_multiple_of(ALIGNMENT));
        offset = offset.saturating_add(partition.length);
        partitions.push(partition);
    }
    Ok((files, partitions))
}

/// As many at a time as there are processors: making one is mostly a program's work.
fn all_images(wanted: &[NamedImage], cache: &Cache) -> Result<Vec<File>, Error> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, File)>, Error> {
        let mut made = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(NamedImage { image: kind, .. }) = wanted.get(index) else {
                return Ok(made);
            };
            match image(kind, cache) {
                Ok(file) => made.push((index, file)),
                Err(error) => {
                    // The others need not go on.
                    next.store(wanted.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let made = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.min(wanted.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers
            .into_iter()
            .map(join)
            .collect::<Result<Vec<_>, Error>>()
    })?;
    let mut made: Vec<(usize, File)> = made.into_iter().flatten().collect();
    made.sort_by_key(|(index, _)| *index);
    Ok(made.into_iter().map(|(_, file)| file).collect())
}
