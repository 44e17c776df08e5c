use std::sync::Arc;

use super::Serial;
use crate::arch::current::layout;
pub(in crate::machine) use crate::devices::pl011::Pl011 as Port;
pub(in crate::machine) use crate::devices::pl011::Pl011State as PortState;
use crate::error::Error;
use crate::hypervisor::{IrqLine, VmBackend};
use crate::vcpu::Buses;

/// The PL011 if there is one. Power is PSCI's, which the hypervisor answers.
pub(in crate::machine) fn attach<B: VmBackend>(
    backend: &B,
    buses: &mut Buses,
    serial: Option<Serial>,
) -> Result<Option<Arc<Port>>, Error> {
    let Some(Serial { sink, state }) = serial else {
        return Ok(None);
    };
    let line = backend.irq_line(layout::PL011_SPI)?;
    let level = Box::new(move |high| line.set(high));
    let port = Arc::new(Port::restored(sink, level, state.unwrap_or_default()));
    let window: Arc<Port> = Arc::clone(&port);
    buses
        .mmio
        .insert(layout::PL011, layout::PL011_SIZE, window)?;
    Ok(Some(port))
}
