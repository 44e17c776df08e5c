//! All devices behind their transports: registers, configuration and queues, used as nobody should.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supermachine_fuzz::devices;
use supermachine_vmm::testing::Board;

fuzz_target!(|data: &[u8]| {
    let Some((&victim, script)) = data.split_first() else {
        return;
    };
    let mut board = Board::new(devices());
    let victim = usize::from(victim) % board.len();
    for device in 0..board.len() {
        board.bring_up(device);
    }
    board.misuse(victim, script);
    for device in 0..board.len() {
        assert!(device == victim || !board.is_broken(device));
    }
    board.bring_up(victim);
});
