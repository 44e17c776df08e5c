//! A PL011 that only writes (Arm DDI 0183): arm64's place for the kernel's log.

use std::fmt;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::bus::BusDevice;
use super::log_sink::LogSink;
use crate::exit::Exit;

const DATA: u64 = 0x00;
const FLAGS: u64 = 0x18;
const INTEGER_BAUD: u64 = 0x24;
const FRACTIONAL_BAUD: u64 = 0x28;
const LINE_CONTROL: u64 = 0x2c;
const CONTROL: u64 = 0x30;
const FIFO_LEVEL: u64 = 0x34;
const INTERRUPT_MASK: u64 = 0x38;
const RAW_INTERRUPTS: u64 = 0x3c;
const MASKED_INTERRUPTS: u64 = 0x40;
const INTERRUPT_CLEAR: u64 = 0x44;
/// Peripheral and cell identification: eight registers of a byte each.
const IDENTIFICATION: u64 = 0xfe0;
const IDENTIFIERS: [u8; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// Transmitter empty, receiver empty: nothing comes in, and what goes out is gone at once.
const TRANSMIT_EMPTY: u32 = 1 << 7;
const RECEIVE_EMPTY: u32 = 1 << 4;
/// The transmitter's interrupt, the only one there is a cause for.
const TRANSMIT: u32 = 1 << 5;
/// After a reset: transmitter and receiver enabled, the port not.
const CONTROL_RESET: u32 = 0x300;
const FIFO_LEVEL_RESET: u32 = 0x12;

/// The port.
pub struct Pl011 {
    state: Mutex<State>,
    /// Sets the level of its interrupt.
    line: Box<dyn Fn(bool) + Send + Sync>,
}

struct State {
    sink: LogSink,
    registers: Pl011State,
}

/// The registers of a port as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pl011State {
    integer_baud: u32,
    fractional_baud: u32,
    line_control: u32,
    control: u32,
    fifo_level: u32,
    mask: u32,
    raw: u32,
}

impl Default for Pl011State {
    fn default() -> Self {
        Self {
            integer_baud: 0,
            fractional_baud: 0,
            line_control: 0,
            control: CONTROL_RESET,
            fifo_level: FIFO_LEVEL_RESET,
            mask: 0,
            raw: 0,
        }
    }
}

impl Pl011 {
    /// A port that writes to `sink`, if there is one, and sets its interrupt by `line`.
    pub fn new(sink: Option<OwnedFd>, line: Box<dyn Fn(bool) + Send + Sync>) -> Self {
        Self::restored(sink, line, Pl011State::default())
    }

    /// The registers, while no vCPU runs.
    pub fn save(&self) -> Pl011State {
        self.state().registers
    }

    /// A port whose registers are what another's were. Any value will do: a guest may have left it.
    pub fn restored(
        sink: Option<OwnedFd>,
        line: Box<dyn Fn(bool) + Send + Sync>,
        registers: Pl011State,
    ) -> Self {
        let state = State {
            sink: LogSink::new(sink),
            registers,
        };
        Self {
            state: Mutex::new(state),
            line,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn read(&self, offset: u64) -> u32 {
        match offset {
            FLAGS => TRANSMIT_EMPTY | RECEIVE_EMPTY,
            INTEGER_BAUD => self.registers.integer_baud,
            FRACTIONAL_BAUD => self.registers.fractional_baud,
            LINE_CONTROL => self.registers.line_control,
            CONTROL => self.registers.control,
            FIFO_LEVEL => self.registers.fifo_level,
            INTERRUPT_MASK => self.registers.mask,
            RAW_INTERRUPTS => self.registers.raw,
            MASKED_INTERRUPTS => self.registers.raw & self.registers.mask,
            IDENTIFICATION.. => {
                let place = usize::try_from((offset - IDENTIFICATION) / 4).unwrap_or(usize::MAX);
                IDENTIFIERS.get(place).copied().unwrap_or(0).into()
            }
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            DATA => {
                // The sink never fails.
                let _ = self.sink.write_all(&[value as u8]);
                self.registers.raw |= TRANSMIT;
            }
            INTEGER_BAUD => self.registers.integer_baud = value & 0xffff,
            FRACTIONAL_BAUD => self.registers.fractional_baud = value & 0x3f,
            LINE_CONTROL => self.registers.line_control = value & 0xff,
            CONTROL => self.registers.control = value & 0xffff,
            FIFO_LEVEL => self.registers.fifo_level = value & 0x3f,
            INTERRUPT_MASK => self.registers.mask = value & 0x7ff,
            INTERRUPT_CLEAR => self.registers.raw &= !value,
            _ => {}
        }
    }
}

impl fmt::Debug for Pl011 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pl011").finish_non_exhaustive()
    }
}

impl BusDevice for Pl011 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Drivers read registers by their width or by bytes of them; all that matters is low.
        let value = self.state().read(offset).to_le_bytes();
        let mut bytes = value.iter().copied().chain(std::iter::repeat(0));
        data.fill_with(|| bytes.next().unwrap_or(0));
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit> {
        let mut value = [0; 4];
        let len = data.len().min(value.len());
        value[..len].copy_from_slice(&data[..len]);
        let high = {
            let mut state = self.state();
            state.write(offset, u32::from_le_bytes(value));
            state.registers.raw & state.registers.mask != 0
        };
        if matches!(offset, DATA | INTERRUPT_MASK | INTERRUPT_CLEAR) {
            (self.line)(high);
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn port() -> (Pl011, io::PipeReader, Arc<Mutex<Vec<bool>>>) {
        let (reader, writer) = io::pipe().unwrap();
        let levels = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&levels);
        let line = Box::new(move |high| record.lock().unwrap().push(high));
        (Pl011::new(Some(writer.into()), line), reader, levels)
    }

    fn read(port: &Pl011, offset: u64) -> u32 {
        let mut data = [0; 4];
        port.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(port: &Pl011, offset: u64, value: u32) {
        assert!(port.write(offset, &value.to_le_bytes()).is_continue());
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let (port, mut reader, _) = port();
        for byte in b"Linux\nhalf" {
            // As Linux does it: a byte, or a word of it.
            assert!(port.write(DATA, &[*byte]).is_continue());
            assert_eq!(read(&port, FLAGS), TRANSMIT_EMPTY | RECEIVE_EMPTY);
        }
        drop(port);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "Linux\nhalf");
    }

    #[test]
    fn the_line_is_high_while_an_unmasked_cause_is_there() {
        let (port, _reader, levels) = port();
        write(&port, DATA, u32::from(b'x'));
        write(&port, INTERRUPT_MASK, TRANSMIT);
        assert_eq!(read(&port, MASKED_INTERRUPTS), TRANSMIT);
        write(&port, INTERRUPT_CLEAR, TRANSMIT);
        assert_eq!(read(&port, RAW_INTERRUPTS), 0);
        write(&port, DATA, u32::from(b'\n'));
        write(&port, INTERRUPT_MASK, 0);
        assert_eq!(*levels.lock().unwrap(), [false, true, false, true, false]);
    }

    #[test]
    fn it_is_a_pl011() {
        let (port, ..) = port();
        let bytes: Vec<_> = (0..8).map(|place| read(&port, 0xfe0 + place * 4)).collect();
        // Part 0x011 of Arm, and the PrimeCell's own number.
        assert_eq!(bytes[0] | (bytes[1] & 0xf) << 8, 0x011);
        assert_eq!(bytes[4..], [0x0d, 0xf0, 0x05, 0xb1]);
        write(&port, LINE_CONTROL, 0x70);
        write(&port, CONTROL, 0x301);
        assert_eq!(
            (read(&port, LINE_CONTROL), read(&port, CONTROL)),
            (0x70, 0x301)
        );
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            accesses in proptest::collection::vec((0u64..0x1000, 0usize..9, any::<u64>()), 0..50)
        ) {
            let (port, ..) = port();
            for (offset, len, value) in accesses {
                let mut data = [0; 8];
                port.read(offset, &mut data[..len]);
                prop_assert!(port.write(offset, &value.to_le_bytes()[..len]).is_continue());
            }
        }
    }
}
