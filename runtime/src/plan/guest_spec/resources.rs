//! Resource limits as the guest's cgroup v2 enforces them.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{Error, Notes, leave_out, refuse, some};

pub(in crate::plan) fn build(
    source: &LinuxResources,
    notes: &mut Notes,
) -> Result<LinuxResources, Error> {
    if let Some(block_io) = source.block_io() {
        check_block_io(block_io, notes)?;
    }
    let hugepages = source
        .hugepage_limits()
        .iter()
        .flatten()
        .any(|limit| limit.limit() > 0);
    leave_out(
        notes,
        hugepages,
        "linux.resources.hugepageLimits",
        "the guest has no huge pages of its own, so that every limit holds",
    );
    let network = source.network().as_ref().is_some_and(|network| {
        network.class_id().is_some_and(|class| class != 0) || some(network.priorities())
    });
    refuse(
        network,
        "linux.resources.network",
        "the guest's packets are classified on the host",
    )?;
    let rdma = source.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty());
    refuse(rdma, "linux.resources.rdma", "the guest has no such device")?;

    let mut resources = LinuxResources::default();
    resources
        .set_devices(source.devices().clone())
        .set_memory(
            source
                .memory()
                .as_ref()
                .map(|memory| self::memory(memory, notes)),
        )
        .set_cpu(
            source
                .cpu()
                .as_ref()
                .map(|cpu| self::cpu(cpu, notes))
                .transpose()?,
        )
        .set_pids(*source.pids())
        .set_unified(unified(source.unified().as_ref())?);
    Ok(resources)
}

/// Files of the guest's cgroup by name.
fn unified(
    source: Option<&HashMap<String, String>>,
) -> Result<Option<HashMap<String, String>>, Error> {
    for name in source.into_iter().flatten().map(|(name, _)| name) {
        // As runc has it: a file, never one elsewhere.
        if name.contains('/') || !name.contains('.') || name.starts_with('.') {
            return Err(Error::Invalid {
                key: "linux.resources.unified".into(),
                value: name.clone(),
                expected: "a file of cgroup v2 such as \"memory.high\"",
            });
        }
    }
    Ok(source.cloned())
}

fn memory(source: &LinuxMemory, notes: &mut Notes) -> LinuxMemory {
    let absent = "cgroup v2 has no such limit";
    leave_out(
        notes,
        source.kernel().is_some(),
        "linux.resources.memory.kernel",
        absent,
    );
    leave_out(
        notes,
        source.kernel_tcp().is_some(),
        "linux.resources.memory.kernelTCP",
        absent,
    );
    leave_out(
        notes,
        source.swappiness().is_some(),
        "linux.resources.memory.swappiness",
        absent,
    );
    leave_out(
        notes,
        source.use_hierarchy().is_some(),
        "linux.resources.memory.useHierarchy",
        "cgroup v2 always does",
    );
    let unkillable = source.disable_oom_killer().unwrap_or(false);
    leave_out(
        notes,
        unkillable,
        "linux.resources.memory.disableOOMKiller",
        absent,
    );
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(source.limit())
        .set_reservation(source.reservation())
        .set_swap(source.swap())
        .set_check_before_update(source.check_before_update());
    memory
}

fn cpu(source: &LinuxCpu, notes: &mut Notes) -> Result<LinuxCpu, Error> {
    let absent = "cgroup v2 has no such limit";
    refuse(
        source.realtime_runtime().is_some_and(|time| time != 0),
        "linux.resources.cpu.realtimeRuntime",
        absent,
    )?;
    refuse(
        source.realtime_period().is_some_and(|time| time != 0),
        "linux.resources.cpu.realtimePeriod",
        absent,
    )?;
    let set = |list: &Option<String>| list.as_ref().is_some_and(|list| !list.is_empty());
    let host = "it numbers the host's, and there holds for the whole machine";
    leave_out(notes, set(source.cpus()), "linux.resources.cpu.cpus", host);
    leave_out(notes, set(source.mems()), "linux.resources.cpu.mems", host);
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(source.shares())
        .set_quota(source.quota())
        .set_period(source.period())
        .set_burst(source.burst())
        .set_idle(source.idle());
    Ok(cpu)
}

fn check_block_io(source: &LinuxBlockIo, notes: &mut Notes) -> Result<(), Error> {
    for (key, present) in [
        ("weightDevice", some(source.weight_device())),
        (
            "throttleReadBpsDevice",
            some(source.throttle_read_bps_device()),
        ),
        (
            "throttleWriteBpsDevice",
            some(source.throttle_write_bps_device()),
        ),
        (
            "throttleReadIOPSDevice",
            some(source.throttle_read_iops_device()),
        ),
        (
            "throttleWriteIOPSDevice",
            some(source.throttle_write_iops_device()),
        ),
    ] {
        let key = format!("linux.resources.blockIO.{key}");
        refuse(present, &key, "it names devices of the host")?;
    }
    let weight = source.weight().is_some() || source.leaf_weight().is_some();
    leave_out(
        notes,
        weight,
        "linux.resources.blockIO.weight",
        "nothing in the machine competes",
    );
    Ok(())
}
