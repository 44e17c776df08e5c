//! The OCI configuration as the guest is to run it: built new from what is known to make sense
//! there. A key that would change what the container was promised is refused by name; one that
//! means nothing in the guest is left out and listed.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxNamespace, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompAction, Mount, Process, Root, Spec, User,
};

use super::{Error, LeftOut, refuse, some};

pub(super) mod resources;
mod sysctl;

/// Device nodes that mean the same in every kernel: path, major, minor.
const GUEST_DEVICES: [(&str, i64, i64); 8] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/fuse", 10, 229),
    ("/dev/net/tun", 10, 200),
];

/// What `linux.rootfsPropagation` may be; runc takes the recursive ones too.
const PROPAGATIONS: [&str; 9] = [
    "",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
];

pub(super) type Notes = Vec<LeftOut>;

fn leave_out(notes: &mut Notes, present: bool, key: &str, reason: &'static str) {
    if present {
        notes.push(LeftOut {
            key: key.to_owned(),
            reason,
        });
    }
}

/// Builds the guest's configuration, with these mounts. `read_only` is whether the container may
/// write to its root.
pub(super) fn build(
    spec: &Spec,
    id: &str,
    read_only: bool,
    mounts: Vec<Mount>,
    notes: &mut Notes,
) -> Result<Spec, Error> {
    if !spec.version().starts_with("1.") {
        let value = spec.version().clone();
        return Err(Error::Invalid {
            key: "ociVersion".into(),
            value,
            expected: "1.x",
        });
    }
    let source = spec
        .process()
        .as_ref()
        .ok_or(Error::Missing { key: "process" })?;
    refuse(
        spec.vm().is_some(),
        "vm",
        "the machine is the administrator's to configure",
    )?;

    let elsewhere = "it is of another operating system";
    leave_out(notes, spec.solaris().is_some(), "solaris", elsewhere);
    leave_out(notes, spec.windows().is_some(), "windows", elsewhere);
    leave_out(notes, spec.zos().is_some(), "zos", elsewhere);

    // Every field that `default()` fills is set below.
    let mut root = Root::default();
    root.set_path("rootfs".into()).set_readonly(Some(read_only));
    let mut guest = Spec::default();
    guest
        .set_version(spec.version().clone())
        .set_root(Some(root))
        .set_process(Some(process(source, notes)?))
        .set_hostname(spec.hostname().clone())
        .set_domainname(spec.domainname().clone())
        .set_annotations(spec.annotations().clone())
        .set_mounts(Some(mounts))
        .set_linux(
            spec.linux()
                .as_ref()
                .map(|linux| self::linux(linux, id, notes))
                .transpose()?,
        );
    Ok(guest)
}

/// The process, without what only the host could honour.
pub(super) fn process(source: &Process, notes: &mut Notes) -> Result<Process, Error> {
    if !some(source.args()) {
        return Err(Error::Missing {
            key: "process.args",
        });
    }
    if !source.cwd().is_absolute() {
        return Err(Error::Invalid {
            key: "process.cwd".into(),
            value: source.cwd().display().to_string(),
            expected: "an absolute path",
        });
    }
    refuse(
        source.exec_cpu_affinity().is_some(),
        "process.execCPUAffinity",
        "it numbers the host's processors, the machine has its own",
    )?;
    if let Some(umask) = source.user().umask().filter(|umask| *umask > 0o777) {
        return Err(Error::Invalid {
            key: "process.user.umask".into(),
            value: format!("{umask:#o}"),
            expected: "0 to 0o777",
        });
    }
    let elsewhere = "it is of another operating system";
    leave_out(
        notes,
        source.command_line().is_some(),
        "process.commandLine",
        elsewhere,
    );
    leave_out(
        notes,
        source.user().username().is_some(),
        "process.user.username",
        elsewhere,
    );
    let label = "the guest has no such security module";
    let set = |label: &Option<String>| label.as_ref().is_some_and(|label| !label.is_empty());
    leave_out(
        notes,
        set(source.apparmor_profile()),
        "process.apparmorProfile",
        label,
    );
    leave_out(
        notes,
        set(source.selinux_label()),
        "process.selinuxLabel",
        label,
    );

    let mut user = User::default();
    user.set_uid(source.user().uid())
        .set_gid(source.user().gid())
        .set_umask(source.user().umask())
        .set_additional_gids(source.user().additional_gids().clone());
    let mut process = Process::default();
    process
        .set_terminal(source.terminal())
        .set_console_size(source.console_size())
        .set_user(user)
        .set_args(source.args().clone())
        .set_env(source.env().clone())
        .set_cwd(source.cwd().clone())
        .set_capabilities(source.capabilities().clone())
        .set_rlimits(source.rlimits().clone())
        .set_no_new_privileges(source.no_new_privileges())
        .set_oom_score_adj(source.oom_score_adj())
        .set_io_priority(*source.io_priority())
        .set_scheduler(source.scheduler().clone());
    Ok(process)
}

fn linux(source: &Linux, id: &str, notes: &mut Notes) -> Result<Linux, Error> {
    let unsupported = "not passed to the guest yet";
    refuse(
        some(source.uid_mappings()),
        "linux.uidMappings",
        unsupported,
    )?;
    refuse(
        some(source.gid_mappings()),
        "linux.gidMappings",
        unsupported,
    )?;
    refuse(
        source.intel_rdt().is_some(),
        "linux.intelRdt",
        "it is the host's to partition",
    )?;
    refuse(
        source.memory_policy().is_some(),
        "linux.memoryPolicy",
        "the guest has one node",
    )?;
    let net_devices = source
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty());
    refuse(net_devices, "linux.netDevices", unsupported)?;
    let flags = source
        .personality()
        .as_ref()
        .is_some_and(|personality| some(personality.flags()));
    refuse(flags, "linux.personality.flags", "no runtime has any")?;
    if let Some(propagation) = source.rootfs_propagation()
        && !PROPAGATIONS.contains(&propagation.as_str())
    {
        return Err(Error::Invalid {
            key: "linux.rootfsPropagation".into(),
            value: propagation.clone(),
            expected: "private, shared, slave or unbindable",
        });
    }
    if let Some(parameters) = source.sysctl() {
        sysctl::check(parameters)?;
    }
    let label = source
        .mount_label()
        .as_ref()
        .is_some_and(|label| !label.is_empty());
    leave_out(
        notes,
        label,
        "linux.mountLabel",
        "the guest has no such security module",
    );

    let resources = match source.resources() {
        Some(resources) => resources::build(resources, notes)?,
        None => LinuxResources::default(),
    };
    let mut linux = Linux::default();
    linux
        .set_sysctl(source.sysctl().clone())
        .set_time_offsets(source.time_offsets().clone())
        .set_resources(Some(resources))
        .set_cgroups_path(Some(PathBuf::from(format!("/{id}"))))
        .set_namespaces(Some(namespaces(
            source.namespaces().as_deref().unwrap_or_default(),
            notes,
        )?))
        .set_devices(devices(source.devices().as_deref())?)
        .set_seccomp(source.seccomp().as_ref().map(seccomp).transpose()?)
        .set_rootfs_propagation(source.rootfs_propagation().clone())
        .set_masked_paths(source.masked_paths().clone())
        .set_readonly_paths(source.readonly_paths().clone())
        .set_personality(source.personality().clone());
    Ok(linux)
}

/// The guest's namespaces. The machine is the network namespace: its interfaces are the
/// container's.
fn namespaces(source: &[LinuxNamespace], notes: &mut Notes) -> Result<Vec<LinuxNamespace>, Error> {
    use LinuxNamespaceType as Type;
    let mut guest = Vec::new();
    for namespace in source {
        let key = format!("linux.namespaces {}", name(namespace.typ()));
        let path = namespace
            .path()
            .as_deref()
            .filter(|path| *path != Path::new(""));
        match (namespace.typ(), path) {
            (Type::Network, None) => {
                leave_out(
                    notes,
                    true,
                    &key,
                    "the machine is a network namespace of its own",
                );
            }
            (Type::Network, Some(_)) => leave_out(
                notes,
                true,
                &key,
                "the host's network namespace is not connected yet: loopback is the only interface",
            ),
            (Type::User, _) => refuse(true, &key, "not passed to the guest yet")?,
            (_, Some(path)) => {
                let reason = format!("{} is the host's and cannot be joined", path.display());
                refuse(true, &key, &reason)?;
            }
            (typ, None) => {
                let mut own = LinuxNamespace::default();
                own.set_typ(typ);
                guest.push(own);
            }
        }
    }
    let has = |typ| guest.iter().any(|namespace| namespace.typ() == typ);
    let reason = "without it the container would share the host's, which a machine cannot";
    refuse(!has(Type::Pid), "A missing linux.namespaces pid", reason)?;
    refuse(!has(Type::Ipc), "A missing linux.namespaces ipc", reason)?;
    // These two only ever separate the container from its agent.
    for typ in [Type::Mount, Type::Uts] {
        if !guest.iter().any(|namespace| namespace.typ() == typ) {
            let mut own = LinuxNamespace::default();
            own.set_typ(typ);
            guest.push(own);
        }
    }
    Ok(guest)
}

/// A namespace as config.json calls it.
fn name(typ: LinuxNamespaceType) -> String {
    serde_json::to_value(typ)
        .ok()
        .and_then(|name| name.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn devices(source: Option<&[LinuxDevice]>) -> Result<Option<Vec<LinuxDevice>>, Error> {
    let Some(source) = source else {
        return Ok(None);
    };
    for device in source {
        let same = GUEST_DEVICES.iter().any(|(path, major, minor)| {
            (Path::new(path), *major, *minor)
                == (device.path().as_path(), device.major(), device.minor())
        });
        let key = format!("The device {}", device.path().display());
        let reason = format!(
            "{}:{} is the host's and cannot be given to the guest",
            device.major(),
            device.minor()
        );
        refuse(!same, &key, &reason)?;
    }
    Ok(Some(source.to_vec()))
}

fn seccomp(source: &LinuxSeccomp) -> Result<LinuxSeccomp, Error> {
    let listener = source.listener_path().is_some();
    refuse(
        listener,
        "linux.seccomp.listenerPath",
        "the listener is a process of the host's",
    )?;
    let notify = source
        .syscalls()
        .iter()
        .flatten()
        .any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify);
    refuse(
        notify || source.default_action() == LinuxSeccompAction::ScmpActNotify,
        "linux.seccomp SCMP_ACT_NOTIFY",
        "the listener is a process of the host's",
    )?;
    Ok(source.clone())
}
