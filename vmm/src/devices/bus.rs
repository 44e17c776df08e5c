//! From an address to the device that answers there.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::exit::Exit;

/// A device on a bus. Called from vCPU threads, several at a time.
pub trait BusDevice: Send + Sync {
    /// Answers a read at `offset` into the device's window.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a write at `offset` into the device's window; breaks when it ends the VM.
    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit>;
}

/// One address space. Filled while the VM is built, then only read, so no access takes a lock.
#[derive(Default)]
pub struct Bus {
    /// Sorted, disjoint.
    windows: Vec<Window>,
}

struct Window {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// The window is empty, wraps around, or overlaps another one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("Device window {start:#x}+{len:#x} is empty, wraps around or overlaps another device")]
pub struct BadWindow {
    start: u64,
    len: u64,
}

impl Bus {
    /// Puts `device` at `start..start + len`.
    ///
    /// # Errors
    /// [`BadWindow`] when it does not fit there.
    pub fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BadWindow> {
        let bad = BadWindow { start, len };
        let Some(end) = start.checked_add(len).filter(|end| *end > start) else {
            return Err(bad);
        };
        let place = self.windows.partition_point(|window| window.start < start);
        let before = place
            .checked_sub(1)
            .and_then(|index| self.windows.get(index));
        if before.is_some_and(|window| window.start + window.len > start)
            || self
                .windows
                .get(place)
                .is_some_and(|window| window.start < end)
        {
            return Err(bad);
        }
        self.windows.insert(place, Window { start, len, device });
        Ok(())
    }

    /// The device whose window holds all of `address..address + len`, and the offset into it.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let place = self
            .windows
            .partition_point(|window| window.start <= address);
        let window = self.windows.get(place.checked_sub(1)?)?;
        let offset = address - window.start;
        let end = offset.checked_add(len as u64)?;
        (end <= window.len).then_some((&*window.device, offset))
    }

    /// Reads; where there is no device, all bits are ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is no device, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) -> ControlFlow<Exit> {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => ControlFlow::Continue(()),
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let windows = self.windows.iter().map(|window| (window.start, window.len));
        f.debug_list().entries(windows).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers reads with its number and remembers writes.
    #[derive(Default)]
    struct Probe {
        number: u8,
        writes: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.number + offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<Exit> {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
            if self.number == 9 {
                return ControlFlow::Break(Exit::PowerOff);
            }
            ControlFlow::Continue(())
        }
    }

    fn probe(number: u8) -> Arc<Probe> {
        Arc::new(Probe {
            number,
            ..Default::default()
        })
    }

    #[test]
    fn accesses_reach_the_device_whose_window_holds_them_whole() {
        let mut bus = Bus::default();
        let (first, second) = (probe(1), probe(100));
        bus.insert(0x2000, 0x10, second.clone()).unwrap();
        bus.insert(0x1000, 0x10, first.clone()).unwrap();
        let read = |address, len: usize| {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x1003, 2), [4, 4]);
        assert_eq!(read(0x200f, 1), [115]);
        // Before, between, across an end, beyond, and at the end of the address space.
        for (address, len) in [
            (0xfff, 1),
            (0x1010, 4),
            (0x100e, 4),
            (0x2010, 1),
            (u64::MAX, 8),
        ] {
            assert_eq!(read(address, len), vec![0xff; len], "{address:#x}");
        }
        assert!(bus.write(0x100e, &[1, 2, 3, 4]).is_continue());
        assert!(bus.write(0x2004, &[1, 2]).is_continue());
        assert!(first.writes.lock().unwrap().is_empty());
        assert_eq!(*second.writes.lock().unwrap(), [(4, vec![1, 2])]);
    }

    #[test]
    fn a_device_can_end_the_vm() {
        let mut bus = Bus::default();
        bus.insert(0x600, 1, probe(9)).unwrap();
        assert_eq!(bus.write(0x600, &[0]), ControlFlow::Break(Exit::PowerOff));
    }

    #[test]
    fn windows_do_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, probe(1)).unwrap();
        for (start, len) in [
            (0x1000, 0x100),
            (0xfff, 2),
            (0x10ff, 1),
            (0x0, 0x10000),
            (0x3000, 0),
            (u64::MAX, 2),
            (0x1080, 0x10),
        ] {
            assert_eq!(
                bus.insert(start, len, probe(2)),
                Err(BadWindow { start, len })
            );
        }
        bus.insert(0x1100, 1, probe(2)).unwrap();
        bus.insert(0xfff, 1, probe(2)).unwrap();
    }
}
