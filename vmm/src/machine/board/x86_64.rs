use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::arch::current::layout;
use crate::devices::power::{KeyboardReset, PowerRegisters};
use crate::devices::serial::Com1;
use crate::error::Error;
use crate::hypervisor::{IrqLine, VmBackend};
use crate::vcpu::Buses;

/// Power registers, the keyboard controller's reset, and COM1 if its log goes anywhere.
pub(in crate::machine) fn attach<B: VmBackend>(
    backend: &B,
    buses: &mut Buses,
    serial: Option<OwnedFd>,
) -> Result<(), Error> {
    let pio = &mut buses.pio;
    let ports = u64::from(layout::POWER_PORTS);
    pio.insert(u64::from(layout::POWER), ports, Arc::new(PowerRegisters))?;
    pio.insert(u64::from(layout::I8042_COMMAND), 1, Arc::new(KeyboardReset))?;
    let Some(sink) = serial else { return Ok(()) };
    let line = backend.irq_line(layout::COM1_PIN)?;
    let com1 = Com1::new(sink, Box::new(move || line.pulse()));
    pio.insert(
        u64::from(layout::COM1),
        u64::from(layout::COM1_PORTS),
        Arc::new(com1),
    )?;
    Ok(())
}
