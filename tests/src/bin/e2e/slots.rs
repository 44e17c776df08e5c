//! Disks that a Linux guest has had empty, and finds filled: at a restore, and while it runs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use sha2::{Digest, Sha256};
use supermachine_tests::until;
use supermachine_vmm::control::DiskSpec;

use crate::machine::{DEADLINE, Told};
use crate::support::{World, equal};

/// No whole number of pages: the end counts too.
const SECTORS: usize = 2049;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![world.vm_test("slots::filled_at_restore_and_later", filled)]
}

fn filled(world: &World) -> Result<()> {
    let dir = tempfile::tempdir_in(world.files()?)?;
    let empty = Image::new(dir.path(), "empty", 0)?;
    let first = Image::new(dir.path(), "first", SECTORS)?;
    let second = Image::new(dir.path(), "second", SECTORS + 8)?;
    let disks = vec![empty.disk(true)?, empty.disk(false)?];
    let mut original = Told::boot(world, "slots", |spec| spec.disks = disks)?;
    sees(&mut original, "vda", &empty)?;
    sees(&mut original, "vdb", &empty)?;
    let snapshot = original.machine.snapshot(dir.path())?;

    // While it runs.
    original.machine.vm.fill_disk(0, &[first.open(true)?])?;
    sees(&mut original, "vda", &first)?;
    sees(&mut original, "vdb", &empty)?;
    original.machine.end()?;

    // At the restore of what was empty then; what stays empty can be filled later.
    let disks = vec![second.disk(true)?, empty.disk(false)?];
    let mut clone = Told::restore(world, &snapshot, disks)?;
    sees(&mut clone, "vda", &second)?;
    sees(&mut clone, "vdb", &empty)?;
    clone.machine.vm.fill_disk(1, &[first.open(false)?])?;
    sees(&mut clone, "vdb", &first)?;
    equal(clone.ask("write vdb here")?.as_str(), "written")?;
    let mut start = [0; 4];
    File::open(&first.path)?.read_exact_at(&mut start, 0)?;
    equal(&start, b"here")?;
    clone.machine.end()
}

/// Waits until the guest's kernel has heard of the disk's size, and has it read all of it.
fn sees(guest: &mut Told, disk: &str, image: &Image) -> Result<()> {
    let sectors = image.sectors;
    until(&format!("{disk} of {sectors} sectors"), DEADLINE, || {
        let answer = guest.ask(&format!("sectors {disk}"))?;
        let found = answer.parse::<usize>().with_context(|| answer.clone())?;
        Ok(found == sectors)
    })?;
    equal(guest.ask(&format!("digest {disk}"))?, image.digest.clone())
}

/// What a disk has.
struct Image {
    path: PathBuf,
    sectors: usize,
    /// Of its content, in hexadecimal.
    digest: String,
}

impl Image {
    /// One no two sectors of which are the same.
    fn new(dir: &Path, name: &str, sectors: usize) -> Result<Self> {
        let words = (0..sectors * 64).flat_map(|word| (word ^ sectors << 40).to_le_bytes());
        let content: Vec<u8> = words.collect();
        let path = dir.join(name);
        fs::write(&path, &content).context("write an image")?;
        Ok(Self {
            path,
            sectors,
            digest: format!("{:x}", Sha256::digest(&content)),
        })
    }

    fn open(&self, read_only: bool) -> Result<File> {
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(&self.path);
        file.with_context(|| format!("open {}", self.path.display()))
    }

    fn disk(&self, read_only: bool) -> Result<DiskSpec> {
        Ok(DiskSpec {
            files: vec![self.open(read_only)?],
            read_only,
            serial: "slot".to_owned(),
        })
    }
}
