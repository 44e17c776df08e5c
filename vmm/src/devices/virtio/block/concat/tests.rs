use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::block::{Block, BlockConfig};

fn file(contents: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(contents, 0).unwrap();
    file
}

/// Reads into buffers of these sizes.
fn read(disk: &mut Concat, offset: u64, sizes: &[usize]) -> io::Result<Vec<u8>> {
    let mut buffers: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0xee; *size]).collect();
    let slices = buffers
        .iter_mut()
        .map(|buffer| VolatileSlice::from(&mut buffer[..]));
    let slices = slices.collect();
    disk.read(offset, slices)?;
    Ok(buffers.concat())
}

#[test]
fn files_start_at_whole_pages_and_zeroes_are_between() {
    let mut disk =
        Concat::open(vec![file(b"one"), file(b""), file(&[2; 4096]), file(b"4")]).unwrap();
    assert_eq!(disk.size(), 3 * ALIGNMENT);
    let all = read(&mut disk, 0, &[1, 4095, 8192]).unwrap();
    let mut expected = vec![0; 3 * 4096];
    expected[..3].copy_from_slice(b"one");
    expected[4096..8192].fill(2);
    expected[8192] = b'4';
    assert!(all == expected);
    let beyond = read(&mut disk, 3 * ALIGNMENT - 1, &[2]).unwrap_err();
    assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_file_that_shrank_is_an_error() {
    let shrinking = file(&[1; 8192]);
    let mut disk = Concat::open(vec![shrinking.try_clone().unwrap(), file(b"2")]).unwrap();
    shrinking.set_len(4096).unwrap();
    assert!(read(&mut disk, 0, &[4096]).is_ok());
    assert!(read(&mut disk, 4096, &[4096]).is_err());
    assert_eq!(read(&mut disk, 8192, &[1]).unwrap(), b"2");
}

#[test]
fn it_cannot_be_written() {
    let mut disk = Concat::open(vec![file(&[1; 4096])]).unwrap();
    assert!(disk.write(0, Vec::new()).is_err());
    assert!(disk.discard(0, 512).is_err());
    assert!(disk.write_zeroes(0, 512, true).is_err());
    disk.flush().unwrap();
    assert_eq!(read(&mut disk, 0, &[1]).unwrap(), [1]);
}

#[test]
fn what_has_no_size_is_refused() {
    let directory = File::open("/").unwrap();
    assert!(Concat::open(vec![file(b"1"), directory]).is_err());
}

#[test]
fn it_makes_a_disk() {
    let backend = Concat::open(vec![file(&[1; 512]), file(&[2; 512])]).unwrap();
    Block::new(BlockConfig {
        id: "block0".into(),
        backend: Box::new(backend),
        read_only: true,
        serial: "layers-0".into(),
    })
    .unwrap();
}

proptest! {
    /// Whatever the sizes and buffers, it reads as the files written out one after the other.
    #[test]
    fn it_reads_as_one_file(
        sizes in proptest::collection::vec(0..3_usize * 4096, 1..6),
        offset in 0..20_000_u64,
        buffers in proptest::collection::vec(0..5000_usize, 1..6),
    ) {
        let mut whole = Vec::new();
        let mut files = Vec::new();
        for (number, size) in (1..).zip(&sizes) {
            let contents = vec![number; *size];
            files.push(file(&contents));
            whole.extend(contents);
            whole.resize(whole.len().next_multiple_of(ALIGNMENT as usize), 0);
        }
        let mut disk = Concat::open(files).unwrap();
        prop_assert_eq!(disk.size(), whole.len() as u64);
        let start = usize::try_from(offset).unwrap();
        let length: usize = buffers.iter().sum();
        match whole.get(start..start + length) {
            Some(expected) => prop_assert!(read(&mut disk, offset, &buffers).unwrap() == expected),
            None => prop_assert!(read(&mut disk, offset, &buffers).is_err() || length == 0),
        }
    }
}
