//! How a guest switches off or resets.

use std::ops::ControlFlow;

use super::bus::BusDevice;
use crate::arch::current::{RESET_VALUE, SLEEP_ENABLE, SLEEP_TYPE_OFF};
use crate::exit::Exit;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
/// SLP_TYP in the sleep control register.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// Sleep control, sleep status and reset registers of the FADT (ACPI 6.5, 4.8.3.6 and 4.8.3.7).
#[derive(Debug)]
pub struct PowerRegisters;

impl BusDevice for PowerRegisters {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit> {
        let [value] = *data else {
            return ControlFlow::Continue(());
        };
        match offset {
            SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF =>
            {
                ControlFlow::Break(Exit::PowerOff)
            }
            RESET if value == RESET_VALUE => ControlFlow::Break(Exit::Reset),
            _ => ControlFlow::Continue(()),
        }
    }
}

/// The keyboard controller's command port, of which only the reset line is there: what a guest falls
/// back to when it is told to reset so (`reboot=k`).
#[derive(Debug)]
pub struct KeyboardReset;

/// Pulse the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

impl BusDevice for KeyboardReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        // Status: the input buffer is empty, so a guest need not wait.
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) -> ControlFlow<Exit> {
        if data == [PULSE_RESET] {
            return ControlFlow::Break(Exit::Reset);
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_values_of_the_tables_end_the_vm() {
        let ends = |offset, value| PowerRegisters.write(offset, &[value]).break_value();
        for value in 0..=255u8 {
            let off = value & 0b11_1100 == 0b11_0100;
            assert_eq!(
                ends(SLEEP_CONTROL, value),
                off.then_some(Exit::PowerOff),
                "{value:#x}"
            );
            assert_eq!(ends(1, value), None);
            assert_eq!(ends(RESET, value), (value == 1).then_some(Exit::Reset));
            let keyboard = KeyboardReset.write(0, &[value]).break_value();
            assert_eq!(keyboard, (value == 0xfe).then_some(Exit::Reset));
        }
        assert!(PowerRegisters.write(0, &[0x34, 0x34]).is_continue());
    }
}
