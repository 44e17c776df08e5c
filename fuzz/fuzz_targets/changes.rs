//! What a container wrote, as its guest tells it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_protocol::changes::{Attributes, Decoder, Encoder, Limits, Record};

const LIMITS: Limits = Limits {
    entries: 100,
    bytes: 1 << 16,
    depth: 10,
};

fuzz_target!(|data: &[u8]| {
    // Most inputs would end at the header, so they get one.
    let mut stream = Vec::new();
    if Encoder::new(&mut stream, &Attributes::default(), false).is_err() {
        return;
    }
    stream.extend(data);
    for bytes in [data, &stream] {
        decode(bytes);
    }
});

fn decode(bytes: &[u8]) {
    let mut decoder = Decoder::new(bytes, LIMITS);
    let (mut names, mut depth, mut data, mut size) = (0_u64, 0_u32, 0_u64, 0_u64);
    while let Ok(Some(record)) = decoder.next_record() {
        let name = match record {
            Record::Directory { name, .. } => {
                depth += 1;
                name
            }
            Record::File { name, size: of, .. } => {
                size = of;
                name
            }
            Record::Symlink { name, .. }
            | Record::Node { name, .. }
            | Record::Link { name, .. }
            | Record::Whiteout { name, .. } => name,
            Record::Data { offset, length } => {
                assert_eq!(decoder.data().len(), length as usize);
                assert!(offset + u64::from(length) <= size);
                data += u64::from(length);
                continue;
            }
            Record::Up => {
                depth -= 1;
                continue;
            }
            Record::Root { .. } | Record::End { .. } | Record::Failed { .. } => continue,
        };
        names += 1;
        assert!(!name.is_empty() && name != b"." && name != b"..");
        assert!(!name.contains(&b'/') && !name.contains(&0));
    }
    assert!(names <= LIMITS.entries && depth <= LIMITS.depth && data <= LIMITS.bytes);
}
