use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::arch::current::layout;
use crate::devices::pl011::Pl011;
use crate::error::Error;
use crate::hypervisor::{IrqLine, VmBackend};
use crate::vcpu::Buses;

/// The PL011 if its log goes anywhere. Power is PSCI's, which the hypervisor answers.
pub(in crate::machine) fn attach<B: VmBackend>(
    backend: &B,
    buses: &mut Buses,
    serial: Option<OwnedFd>,
) -> Result<(), Error> {
    let Some(sink) = serial else { return Ok(()) };
    let line = backend.irq_line(layout::PL011_SPI)?;
    let pl011 = Pl011::new(sink, Box::new(move |high| line.set(high)));
    buses
        .mmio
        .insert(layout::PL011, layout::PL011_SIZE, Arc::new(pl011))?;
    Ok(())
}
