//! COM1: a 16550 that only writes. It is the kernel's log, never anybody's stdio.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::bus::BusDevice;
use super::log_sink::LogSink;
use crate::exit::Exit;

/// COM1.
pub struct Com1 {
    uart: Mutex<Serial<Edge, NoEvents, LogSink>>,
}

/// The registers of a port as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Com1State {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

impl Com1 {
    /// A port that writes to `sink`, if there is one, and raises its interrupt by `raise`.
    pub fn new(sink: Option<OwnedFd>, raise: Box<dyn Fn() + Send + Sync>) -> Self {
        let uart = Serial::new(Edge(raise), LogSink::new(sink));
        Self {
            uart: Mutex::new(uart),
        }
    }

    /// The registers, while no vCPU runs.
    pub fn save(&self) -> Com1State {
        let state = self.uart().state();
        Com1State {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// A port whose registers are what another's were. Any value will do: a guest may have left it.
    pub fn restored(
        sink: Option<OwnedFd>,
        raise: Box<dyn Fn() + Send + Sync>,
        state: Com1State,
    ) -> io::Result<Self> {
        let registers = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        };
        let sink = LogSink::new(sink);
        let uart = Serial::from_state(&registers, Edge(raise), NoEvents, sink)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(Self {
            uart: Mutex::new(uart),
        })
    }

    fn uart(&self) -> std::sync::MutexGuard<'_, Serial<Edge, NoEvents, LogSink>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Com1 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Com1").finish_non_exhaustive()
    }
}

impl BusDevice for Com1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = self.uart().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit> {
        if let (&[value], Ok(offset)) = (data, u8::try_from(offset)) {
            // The sink never fails, and neither does the trigger.
            let _ = self.uart().write(offset, value);
        }
        ControlFlow::Continue(())
    }
}

struct Edge(Box<dyn Fn() + Send + Sync>);

impl Trigger for Edge {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    fn port() -> (Com1, io::PipeReader, Arc<AtomicUsize>) {
        let (reader, writer) = io::pipe().unwrap();
        let edges = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&edges);
        let raise = Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        (Com1::new(Some(writer.into()), raise), reader, edges)
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let (port, mut reader, _) = port();
        for byte in b"Linux\nhalf" {
            assert!(port.write(DATA, &[*byte]).is_continue());
        }
        let mut line = [0; 6];
        reader.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"Linux\n");
        drop(port);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "half");
    }

    #[test]
    fn the_transmitter_is_always_empty_and_says_so_by_interrupt() {
        let (port, _reader, edges) = port();
        let mut status = [0];
        port.read(LINE_STATUS, &mut status);
        assert_eq!(status[0] & 0x60, 0x60);
        assert!(port.write(INTERRUPT_ENABLE, &[2]).is_continue());
        assert!(edges.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_reader_that_sleeps_does_not_stop_the_guest() {
        let (port, _reader, _) = port();
        for _ in 0..1 << 20 {
            assert!(port.write(DATA, b"\n").is_continue());
        }
    }

    #[test]
    fn a_restored_port_has_the_registers_of_the_saved_one() {
        let (port, _reader, _) = port();
        for (offset, value) in [(1, 2), (3, 0x83), (0, 7), (4, 0x0b), (7, 0x5a)] {
            assert!(port.write(offset, &[value]).is_continue());
        }
        let other = Com1::restored(None, Box::new(|| ()), port.save()).unwrap();
        assert_eq!(other.save(), port.save());
        let mut scratch = [0];
        other.read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
        // Nobody hears it.
        assert!(other.write(DATA, b"\n").is_continue());
    }

    #[test]
    fn wide_accesses_do_nothing() {
        let (port, _reader, _) = port();
        let mut wide = [0; 4];
        port.read(LINE_STATUS, &mut wide);
        assert_eq!(wide, [0xff; 4]);
        assert!(port.write(DATA, &[0; 4]).is_continue());
        assert!(port.write(700, &[0]).is_continue());
    }
}
