//! Resource limits as the guest's cgroup v2 enforces them.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{Error, Notes, leave_out, refuse, some};

pub(super) fn build(source: &LinuxResources, notes: &mut Notes) -> Result<LinuxResources, Error> {
    if let Some(block_io) = source.block_io() {
        check_block_io(block_io, notes)?;
    }
    let hugepages = source
        .hugepage_limits()
        .iter()
        .flatten()
        .any(|limit| limit.limit() > 0);
    let key = "linux.resources.hugepageLimits";
    refuse(hugepages, key, "the guest reserves no huge pages")?;
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
        .set_unified(source.unified().clone());
    Ok(resources)
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
    let realtime = source.realtime_runtime().is_some_and(|time| time != 0)
        || source.realtime_period().is_some_and(|time| time != 0);
    refuse(
        realtime,
        "linux.resources.cpu.realtimeRuntime",
        "cgroup v2 has no such limit",
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
    let by_device = some(source.weight_device())
        || some(source.throttle_read_bps_device())
        || some(source.throttle_write_bps_device())
        || some(source.throttle_read_iops_device())
        || some(source.throttle_write_iops_device());
    let key = "linux.resources.blockIO";
    refuse(by_device, key, "it names devices of the host")?;
    let weight = source.weight().is_some() || source.leaf_weight().is_some();
    leave_out(
        notes,
        weight,
        "linux.resources.blockIO.weight",
        "nothing in the machine competes",
    );
    Ok(())
}
