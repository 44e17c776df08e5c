use std::io::Write;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;

const PAGE: u64 = 4096;

/// A file of some pages, each filled with its number, or nothing where the kernel has no io_uring.
fn ring(pages: u8, depth: u32) -> Option<(Ring, File, GuestMemory)> {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all(&[page; PAGE as usize]).unwrap();
    }
    let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
    match Spare::new(depth).and_then(|spare| Ring::new(spare, &[&file])) {
        Ok(ring) => Some((ring, file, memory)),
        Err(error) => {
            // A host that forbids it is told apart from a mistake of ours.
            let known = [libc::ENOSYS, libc::EPERM, libc::ENOMEM];
            assert!(
                error
                    .raw_os_error()
                    .is_some_and(|errno| known.contains(&errno)),
                "{error}"
            );
            None
        }
    }
}

fn slices(memory: &GuestMemory, places: &[(u64, usize)]) -> Vec<VolatileSlice<'static>> {
    places
        .iter()
        .map(|&(at, len)| {
            let slice = memory.get_slice(GuestAddress(at), len).unwrap();
            // SAFETY: the tests keep `memory` longer than what they make of it.
            unsafe { VolatileSlice::new(slice.ptr_guard_mut().as_ptr(), slice.len()) }
        })
        .collect()
}

fn all_ended(ring: &mut Ring) -> Vec<Ended> {
    let mut ended = Vec::new();
    while ring.in_flight() > 0 {
        ring.enter(1).unwrap();
        while let Some(one) = ring.ended() {
            ended.push(one);
        }
    }
    ended
}

#[test]
fn transfers_beyond_the_depth_all_end_whole() {
    let Some((mut ring, file, memory)) = ring(32, 4) else {
        return;
    };
    for page in 0..32 {
        let at = page * 2 * PAGE;
        let halves = slices(&memory, &[(at, 1000), (at + 1000, PAGE as usize - 1000)]);
        ring.transfer(page, Direction::Read, (0, page * PAGE), &halves, &memory)
            .unwrap();
    }
    assert_eq!(ring.in_flight(), 32);
    let mut tags: Vec<_> = all_ended(&mut ring)
        .into_iter()
        .map(|ended| {
            ended.result.unwrap();
            ended.tag
        })
        .collect();
    tags.sort_unstable();
    assert_eq!(tags, Vec::from_iter(0..32));
    for page in 0..32_u64 {
        let mut bytes = [0xee; PAGE as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(page * 2 * PAGE))
            .unwrap();
        assert_eq!(bytes, [page as u8; PAGE as usize]);
    }
    assert!(ring.bell().clear().unwrap(), "the bell has rung");

    memory.write_slice(b"written", GuestAddress(0)).unwrap();
    let text = slices(&memory, &[(0, 7)]);
    ring.transfer(7, Direction::Write, (0, 50), &text, &memory)
        .unwrap();
    ring.sync(8, 0);
    assert!(
        all_ended(&mut ring)
            .iter()
            .all(|ended| ended.result.is_ok())
    );
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 49).unwrap();
    assert_eq!(&bytes, b"\0written");
}

#[test]
fn the_end_of_a_file_is_an_error_and_more_slices_than_one_call_takes_are_not() {
    let Some((mut ring, _file, memory)) = ring(2, 4) else {
        return;
    };
    let beyond = slices(&memory, &[(0, 3 * PAGE as usize)]);
    ring.transfer(1, Direction::Read, (0, 0), &beyond, &memory)
        .unwrap();
    let ended = all_ended(&mut ring).pop().unwrap();
    assert_eq!(
        ended.result.unwrap_err().kind(),
        io::ErrorKind::UnexpectedEof
    );

    let places: Vec<_> = (0..2000).map(|at| (at * 8, 4)).collect();
    let many = slices(&memory, &places);
    ring.transfer(2, Direction::Read, (0, 0), &many, &memory)
        .unwrap();
    ring.transfer(3, Direction::Read, (0, 0), &[], &memory)
        .unwrap();
    assert!(
        all_ended(&mut ring)
            .iter()
            .all(|ended| ended.result.is_ok())
    );
    let last: [u8; 4] = memory.read_obj(GuestAddress(1999 * 8)).unwrap();
    assert_eq!(last, [1; 4]);
}

#[test]
fn only_memory_that_is_kept_and_files_that_were_named_can_be_used() {
    let Some((mut ring, _file, memory)) = ring(2, 4) else {
        return;
    };
    let other = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let strange = slices(&other, &[(0, 16)]);
    let refused = ring.transfer(1, Direction::Read, (0, 0), &strange, &memory);
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(ring.in_flight(), 0);

    let good = slices(&memory, &[(0, 16)]);
    ring.transfer(2, Direction::Read, (1, 0), &good, &memory)
        .unwrap();
    let ended = all_ended(&mut ring).pop().unwrap();
    assert_eq!(ended.result.unwrap_err().raw_os_error(), Some(libc::EBADF));

    // Whoever gets hold of the ring opens nothing through it.
    let path = c"/dev/null";
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
    // SAFETY: the path is a constant.
    unsafe { ring.ring.submission().push(&open) }.unwrap();
    ring.ring.submit_and_wait(1).unwrap();
    let answer = ring.ring.completion().next().unwrap().result();
    assert_eq!(answer, -libc::EACCES);
}

#[test]
fn what_is_dropped_has_ended() {
    let Some((mut ring, _file, memory)) = ring(16, 4) else {
        return;
    };
    for page in 0..16 {
        let slice = slices(&memory, &[(page * PAGE, PAGE as usize)]);
        ring.transfer(page, Direction::Read, (0, page * PAGE), &slice, &memory)
            .unwrap();
    }
    drop(ring);
    for page in 0..16_u64 {
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap(),
            page as u8
        );
    }
}
