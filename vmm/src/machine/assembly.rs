//! From a configuration to a VM ready to run.

#![allow(unsafe_code)]

use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::board::{self, Serial};
use super::devices::{DeviceSet, Devices, Handles, Windows, refused};
use super::run::{self, Begin, Running};
use crate::arch::current::{
    self, BootSource, KernelImage, MEMORY_STEP, MIN_MEMORY, Platform, layout,
};
use crate::arch::{CpuCaps, VcpuSetup};
use crate::config::VmConfig;
use crate::devices::virtio::console::PortEnds;
use crate::devices::virtio::transport::mmio::QUEUE_NOTIFY;
use crate::error::Error;
use crate::hypervisor::{Hypervisor, Vcpu, VcpuSeed, VmBackend};
use crate::memory::GuestMemory;
use crate::sys::{random, threads};
use crate::vcpu::{Buses, encode};

/// A VM ready to run.
pub(super) struct Assembly<B: VmBackend> {
    // The VM goes before the memory it maps.
    vcpus: Vec<(B::Seed, Begin<VcpuOf<B>>)>,
    buses: Arc<Buses>,
    devices: Devices,
    handles: Handles,
    backend: B,
    memory: GuestMemory,
}

/// The vCPUs of a hypervisor's VMs.
pub(super) type VcpuOf<B> = <<B as VmBackend>::Seed as VcpuSeed>::Vcpu;

/// Checks what can be checked without a hypervisor.
pub(super) fn check(config: &VmConfig) -> Result<KernelImage, Error> {
    if config.vcpus == 0 || config.vcpus > current::MAX_VCPUS {
        return Err(Error::Vcpus {
            asked: config.vcpus,
            max: current::MAX_VCPUS,
        });
    }
    if config.memory < MIN_MEMORY || !config.memory.is_multiple_of(MEMORY_STEP) {
        return Err(Error::MemorySize {
            asked: config.memory,
            step: MEMORY_STEP,
            min: MIN_MEMORY,
        });
    }
    Ok(KernelImage::recognise(&config.kernel)?)
}

impl<B> Assembly<B>
where
    B: VmBackend<Seed: VcpuSeed<Vcpu: Vcpu<Setup = VcpuSetup>>>,
{
    pub(super) fn new<H: Hypervisor<Vm = B, Cpu = CpuCaps>>(
        hypervisor: &H,
        mut config: VmConfig,
        kernel: &KernelImage,
    ) -> Result<Self, Error> {
        let caps = hypervisor.caps();
        if config.vcpus > caps.max_vcpus {
            return Err(Error::Vcpus {
                asked: config.vcpus,
                max: caps.max_vcpus,
            });
        }
        let memory = GuestMemory::anonymous(&layout::ram_ranges(config.memory))?;
        let mut set = DeviceSet::new(memory.clone(), config.on_device_fault.take())?;
        let handles = set.add_configured(&mut config)?;
        // What is left over goes while the VM is made.
        drop(std::mem::take(&mut config.rings));
        let mut seed = [0; current::SEED_LEN];
        random::fill(&mut seed).map_err(Error::Entropy)?;
        let source = BootSource {
            kernel,
            kernel_file: &mut config.kernel,
            initramfs: config.initramfs.as_mut(),
            command_line: &config.cmdline,
            seed,
        };
        let serial = config.serial.is_some();
        let platform = Platform::new(&caps.cpu, config.vcpus, set.len(), serial);
        // A thread of its own fills guest RAM, and this one waits for the VM: so, on a host with one
        // processor, what the VM waits for comes first.
        let (backend, entry) = thread::scope(|scope| {
            let loading = threads::builder("load")
                .spawn_scoped(scope, || current::load(&memory, source, platform))
                .map_err(|source| Error::Thread {
                    name: "load".into(),
                    source,
                })?;
            let made = hypervisor.create_vm();
            let loaded = loading.join().unwrap_or_else(|panic| resume_unwind(panic));
            Ok::<_, Error>((made?, loaded?))
        })?;
        let windows = set.build()?;
        let serial = config.serial.take().map(|sink| Serial {
            sink: Some(sink),
            state: None,
        });
        let count = config.vcpus;
        let begin = |index| {
            let setup = current::vcpu_setup(&caps.cpu, index, count, entry);
            Ok(Begin::Boot(setup))
        };
        Self::put_together(backend, memory, windows, handles, serial, (count, begin))
    }

    /// Gives a VM its memory, vCPUs and devices.
    pub(super) fn put_together(
        backend: B,
        memory: GuestMemory,
        windows: Windows<B::Line>,
        handles: Handles,
        serial: Option<Serial>,
        (count, begin): (u32, impl Fn(u32) -> Result<Begin<VcpuOf<B>>, Error>),
    ) -> Result<Self, Error> {
        for (slot, (guest, host, len)) in (0..).zip(memory.host_ranges()) {
            // SAFETY: `Assembly` and `Running` keep the memory until after VM and vCPUs are gone,
            // and vm-memory makes no references into it.
            unsafe { backend.map(slot, guest.0, host, len) }?;
        }
        // Before any device: a balloon asks what can be discarded as one.
        if let Some(stage_two) = backend.stage_two() {
            memory.set_stage_two(stage_two);
        }
        let vcpus = (0..count)
            .map(|index| Ok((backend.create_vcpu(index)?, begin(index)?)))
            .collect::<Result<_, Error>>()?;
        // An interrupt controller may have to know its vCPUs before it has lines.
        backend.complete()?;
        let mut buses = Buses::default();
        let port = board::attach(&backend, &mut buses, serial)?;
        let devices = windows.attach(&backend, &mut buses.mmio, port)?;
        Ok(Self {
            vcpus,
            buses: Arc::new(buses),
            devices,
            handles,
            backend,
            memory,
        })
    }

    pub(super) fn backend(&self) -> &B {
        &self.backend
    }

    /// Connects a port of the console before the guest goes on.
    pub(super) fn attach(&self, port: u32, ends: PortEnds) -> Result<(), Error> {
        let Some(console) = &self.handles.console else {
            return Ok(());
        };
        let attaching = console
            .begin_attach(port, ends)
            .map_err(refused("console0"))?;
        // No driver is at work: there is nothing to wait for.
        attaching.wait(Duration::ZERO).map_err(refused("console0"))
    }

    pub(super) fn start(self) -> Result<Running, Error> {
        let backend = Arc::new(self.backend);
        let bound = Arc::clone(&backend);
        run::start(run::Parts {
            vcpus: self.vcpus,
            buses: self.buses,
            devices: self.devices,
            handles: self.handles,
            memory: self.memory,
            bound: Box::new(move || bound.bound()),
            save_vm: Box::new(move || encode(&backend.save()?)),
        })
    }
}

/// The address whose 32-bit writes ring the doorbells of the device in `slot`.
pub(super) fn notify_address(slot: u32) -> u64 {
    layout::virtio_address(slot) + QUEUE_NOTIFY
}
