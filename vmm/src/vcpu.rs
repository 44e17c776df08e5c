//! The one run loop.

use std::io;
use std::ops::ControlFlow;

use serde::Serialize;

use crate::devices::bus::Bus;
use crate::exit::Exit;
use crate::hypervisor::{HypervisorError, KICK, RUN_VCPU, SAVE_VCPU, Vcpu, VcpuExit};
use crate::jail::{Filter, Rule, When, allow, allow_if, calls};
use crate::snapshot::state;
use crate::sys::threads;

/// The thread of a vCPU: it runs the guest, rings doorbells, writes what the serial port says.
pub(crate) const VCPU: Filter = Filter {
    name: "vcpu",
    tables: &[threads::EVERY, RUNNING, RUN_VCPU, SAVE_VCPU],
};

/// What it takes to run, beside the hypervisor's calls.
pub(crate) const RUNNING: &[Rule] = &[
    // To a serial log that is full.
    allow(calls::SYS_poll),
    allow(calls::SYS_ppoll),
    // A vCPU that ends brings the others out.
    allow_if(calls::SYS_tgkill, &[When::Is(2, KICK as u32)]),
    // What the last one leaves: sources of devices.
    allow(calls::SYS_epoll_ctl),
    // Doorbells of a device that the guest starts.
    allow(calls::SYS_dup),
    allow_if(
        calls::SYS_fcntl,
        &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)],
    ),
];

/// The address spaces a vCPU sees devices in.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    pub(crate) mmio: Bus,
    pub(crate) pio: Bus,
}

/// What keeps vCPUs out of the guest. Whoever shuts it also kicks.
pub(crate) trait Gate {
    /// Whether the VM is over. Looked at before each entry.
    fn is_closed(&self) -> bool;

    /// Waits out a pause; answers whether there was one. Asked after a kick, when nothing of an
    /// earlier exit is left to be completed: the vCPU's state is whole, and `save` tells it to
    /// whoever asks meanwhile.
    fn rest(&self, save: &mut dyn FnMut() -> Result<Vec<u8>, HypervisorError>) -> bool;
}

/// Runs the vCPU until the VM ends; answers how.
pub(crate) fn run<V: Vcpu>(vcpu: &mut V, buses: &Buses, gate: &impl Gate) -> Exit {
    while !gate.is_closed() {
        let mut kicked = false;
        let flow = match vcpu.run() {
            VcpuExit::MmioRead { address, data } => {
                buses.mmio.read(address, data);
                ControlFlow::Continue(())
            }
            VcpuExit::MmioWrite { address, data } => buses.mmio.write(address, data),
            VcpuExit::PioRead { port, size, data } => {
                for item in data.chunks_mut(size) {
                    buses.pio.read(u64::from(port), item);
                }
                ControlFlow::Continue(())
            }
            VcpuExit::PioWrite { port, size, data } => data
                .chunks(size)
                .try_for_each(|item| buses.pio.write(u64::from(port), item)),
            VcpuExit::SystemOff => ControlFlow::Break(Exit::PowerOff),
            VcpuExit::SystemReset => ControlFlow::Break(Exit::Reset),
            VcpuExit::Shutdown => ControlFlow::Break(Exit::TripleFault),
            VcpuExit::Kicked => {
                kicked = true;
                ControlFlow::Continue(())
            }
            VcpuExit::Fault(fault) => ControlFlow::Break(Exit::Fault(fault.to_string())),
        };
        if let ControlFlow::Break(exit) = flow {
            return exit;
        }
        if kicked && gate.rest(&mut || encode(&vcpu.save()?)) {
            vcpu.resumed();
        }
    }
    Exit::Stopped
}

/// A state as it goes into a snapshot.
pub(crate) fn encode(state: &impl Serialize) -> Result<Vec<u8>, HypervisorError> {
    // Not to be had: every field is a number or a list of them.
    state::encode(state).map_err(|error| HypervisorError::Call {
        call: "serialize",
        source: io::Error::other(error),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::devices::bus::BusDevice;
    use crate::hypervisor::Fault;
    use crate::hypervisor::fake::{Answer, FakeVcpu, Step};

    /// Remembers what happens to it; reads give its number.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(0xa0 + offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit> {
            self.0.lock().unwrap().push((offset, data.to_vec()));
            ControlFlow::Continue(())
        }
    }

    /// Ends the VM: its first register by switching off, the others by a reset.
    struct Power;

    impl BusDevice for Power {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0);
        }

        fn write(&self, offset: u64, _: &[u8]) -> ControlFlow<Exit> {
            ControlFlow::Break(match offset {
                0 => Exit::PowerOff,
                _ => Exit::Reset,
            })
        }
    }

    /// Open, or closed.
    struct Open(bool);

    impl Gate for Open {
        fn is_closed(&self) -> bool {
            !self.0
        }

        fn rest(&self, _: &mut dyn FnMut() -> Result<Vec<u8>, HypervisorError>) -> bool {
            false
        }
    }

    fn run_steps(steps: Vec<Step>) -> (Exit, Vec<Answer>, Arc<Probe>) {
        let probe = Arc::new(Probe::default());
        let mut buses = Buses::default();
        buses
            .mmio
            .insert(0xd000_0000, 0x1000, probe.clone())
            .unwrap();
        buses.pio.insert(0x3f8, 8, probe.clone()).unwrap();
        buses.pio.insert(0x600, 3, Arc::new(Power)).unwrap();
        let mut vcpu = FakeVcpu::scripted(steps);
        let exit = run(&mut vcpu, &buses, &Open(true));
        (exit, vcpu.answers().to_vec(), probe)
    }

    #[test]
    fn accesses_reach_devices_and_reads_are_answered() {
        let (exit, answers, probe) = run_steps(vec![
            Step::MmioRead {
                address: 0xd000_0004,
                len: 4,
            },
            Step::MmioRead {
                address: 0xe000_0000,
                len: 2,
            },
            Step::MmioWrite {
                address: 0xd000_0050,
                data: vec![1, 0, 0, 0],
            },
            Step::Kicked,
            Step::PioRead {
                port: 0x3fd,
                size: 1,
                count: 1,
            },
            Step::Shutdown,
        ]);
        assert_eq!(exit, Exit::TripleFault);
        assert_eq!(answers, [vec![0xa4; 4], vec![0xff; 2], vec![0xa5]]);
        assert_eq!(*probe.0.lock().unwrap(), [(0x50, vec![1, 0, 0, 0])]);
    }

    #[test]
    fn a_string_instruction_is_many_accesses_of_one_port() {
        let (_, answers, probe) = run_steps(vec![
            Step::PioWrite {
                port: 0x3f8,
                size: 1,
                data: b"abc".to_vec(),
            },
            Step::PioWrite {
                port: 0x3f8,
                size: 2,
                data: b"abcd".to_vec(),
            },
            Step::PioRead {
                port: 0x3f9,
                size: 2,
                count: 2,
            },
            Step::Shutdown,
        ]);
        let writes: Vec<_> = probe
            .0
            .lock()
            .unwrap()
            .iter()
            .map(|(_, data)| data.clone())
            .collect();
        assert_eq!(
            writes,
            [
                b"a".to_vec(),
                b"b".into(),
                b"c".into(),
                b"ab".into(),
                b"cd".into()
            ]
        );
        assert_eq!(answers, [vec![0xa1; 4]]);
    }

    #[test]
    fn each_end_has_its_reason() {
        let fault = Fault::Emulation {
            suberror: 1,
            details: vec![0xf4],
        };
        for (step, expected) in [
            (Step::Shutdown, Exit::TripleFault),
            (Step::SystemOff, Exit::PowerOff),
            (Step::SystemReset, Exit::Reset),
            (
                Step::PioWrite {
                    port: 0x600,
                    size: 1,
                    data: vec![0x34],
                },
                Exit::PowerOff,
            ),
            (
                Step::PioWrite {
                    port: 0x602,
                    size: 1,
                    data: vec![1],
                },
                Exit::Reset,
            ),
            (Step::Fault(fault.clone()), Exit::Fault(fault.to_string())),
        ] {
            // A step too many: running on would answer with its exit.
            let (exit, ..) = run_steps(vec![step, Step::Fault(Fault::EntryFailed { reason: 7 })]);
            assert_eq!(exit, expected);
        }
    }

    #[test]
    fn a_stopped_vcpu_does_not_enter_the_guest() {
        let mut vcpu = FakeVcpu::scripted(vec![Step::Shutdown]);
        let exit = run(&mut vcpu, &Buses::default(), &Open(false));
        assert_eq!(exit, Exit::Stopped);
        assert_eq!(vcpu.steps_left(), 1);
    }
}
