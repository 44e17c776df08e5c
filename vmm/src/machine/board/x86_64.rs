use std::sync::Arc;

use super::super::devices::refused;
use super::Serial;
use crate::arch::current::layout;
use crate::devices::power::{KeyboardReset, PowerRegisters};
pub(in crate::machine) use crate::devices::serial::Com1 as Port;
pub(in crate::machine) use crate::devices::serial::Com1State as PortState;
use crate::error::Error;
use crate::hypervisor::{IrqLine, VmBackend};
use crate::vcpu::Buses;

/// Power registers, the keyboard controller's reset, and COM1 if there is one.
pub(in crate::machine) fn attach<B: VmBackend>(
    backend: &B,
    buses: &mut Buses,
    serial: Option<Serial>,
) -> Result<Option<Arc<Port>>, Error> {
    let pio = &mut buses.pio;
    let ports = u64::from(layout::POWER_PORTS);
    pio.insert(u64::from(layout::POWER), ports, Arc::new(PowerRegisters))?;
    pio.insert(u64::from(layout::I8042_COMMAND), 1, Arc::new(KeyboardReset))?;
    let Some(Serial { sink, state }) = serial else {
        return Ok(None);
    };
    let line = backend.irq_line(layout::COM1_PIN)?;
    let raise = Box::new(move || line.pulse());
    let port = match state {
        None => Port::new(sink, raise),
        Some(state) => Port::restored(sink, raise, state).map_err(refused("com1"))?,
    };
    let port = Arc::new(port);
    let window: Arc<Port> = Arc::clone(&port);
    let ports = u64::from(layout::COM1_PORTS);
    pio.insert(u64::from(layout::COM1), ports, window)?;
    Ok(Some(port))
}
