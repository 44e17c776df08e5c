//! A descriptor table of any bytes: a fault, or a chain within guest RAM.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_vmm::testing::{DriverQueue, Guest};

const SIZE: u16 = 16;

fuzz_target!(|data: &[u8]| {
    let Some((&head, table)) = data.split_first() else {
        return;
    };
    let guest = Guest::new(1 << 20);
    let mut driver = DriverQueue::new(&guest, 0, SIZE);
    // What does not fit the table is memory that indirect descriptors may find.
    let (table, memory) = table.split_at(table.len().min(16 * usize::from(SIZE)));
    guest.write(driver.addresses()[0], table);
    guest.write(0x8000, &memory[..memory.len().min(0x8000)]);
    driver.publish(u16::from(head));
    let mut queue = driver.device_side();
    let Ok(Some(chain)) = queue.pop() else { return };
    let (mut readable, mut writable) = (0, 0);
    for segment in chain.readable() {
        readable += u64::from(segment.len);
        assert!(segment.addr.0 + u64::from(segment.len) <= guest.end());
    }
    for segment in chain.writable() {
        writable += u64::from(segment.len);
        assert!(segment.addr.0 + u64::from(segment.len) <= guest.end());
    }
    assert_eq!(
        (readable, writable),
        (chain.readable_len(), chain.writable_len())
    );
    let mut bytes = vec![0; readable.min(1 << 16) as usize];
    chain
        .reader()
        .read_exact(&mut bytes)
        .expect("bytes that were counted");
    queue.complete(chain, 0).expect("a ring in RAM");
});
