//! The disks of a root file system.

use std::fs::File;

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
    let (mut files, mut partitions) = (Vec::new(), Vec::new());
    let mut offset = 0_u64;
    for NamedImage { name, image: kind } in wanted {
        let file = image(kind, cache)?;
        let size = images::size(&file)?;
        let mut partition = Partition::new();
        partition.name.clone_from(name);
        serial.clone_into(&mut partition.disk);
        (partition.offset, partition.length) = (offset, size.next_multiple_of(ALIGNMENT));
        offset = offset.saturating_add(partition.length);
        files.push(file);
        partitions.push(partition);
    }
    Ok((files, partitions))
}
