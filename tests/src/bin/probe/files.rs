//! What the file system shows: mounts, devices, masked paths.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::{Map, Value, json};

/// A small file's text, or the error of reading it.
pub(crate) fn text(path: &str) -> Value {
    match fs::read_to_string(path) {
        Ok(text) => json!(text.trim_end()),
        Err(error) => errno(&error),
    }
}

fn errno(error: &std::io::Error) -> Value {
    json!({ "errno": error.raw_os_error() })
}

/// `/proc/self/mountinfo` by mount point: root within the file system, options of the mount,
/// whether it propagates, type, source and options of the file system. Mounts over one another are
/// numbered.
pub(crate) fn mounts() -> Value {
    let mut mounts = Map::new();
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in text.lines() {
        let Some((mount, system)) = line.split_once(" - ") else {
            continue;
        };
        let mount: Vec<&str> = mount.split(' ').collect();
        let system: Vec<&str> = system.split(' ').collect();
        let (
            &[_, _, _, root, point, options, ref propagation @ ..],
            &[kind, source, super_options],
        ) = (&mount[..], &system[..])
        else {
            continue;
        };
        // "master:12": of its kind there is only the question whether.
        let propagation: Vec<&str> = propagation
            .iter()
            .filter_map(|tag| tag.split(':').next())
            .collect();
        let mut key = point.to_owned();
        while mounts.contains_key(&key) {
            key.push('\'');
        }
        let sorted = |options: &str| {
            let mut options: Vec<String> = options.split(',').map(str::to_owned).collect();
            options.sort();
            options
        };
        mounts.insert(
            key,
            json!({
                "root": root,
                "options": sorted(options),
                "propagation": propagation,
                "type": kind,
                "source": source,
                "super_options": sorted(super_options),
            }),
        );
    }
    Value::Object(mounts)
}

/// Paths that runtimes hide or protect: how they look, and whether they can be written to.
pub(crate) fn masked() -> Value {
    const PATHS: [&str; 17] = [
        "/proc/acpi",
        "/proc/asound",
        "/proc/bus",
        "/proc/fs",
        "/proc/interrupts",
        "/proc/irq",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/sys",
        "/proc/sysrq-trigger",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
    ];
    let look = |path: &str| {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) => return errno(&error),
        };
        let writable = nix::unistd::access(path, nix::unistd::AccessFlags::W_OK);
        let content = if metadata.is_dir() {
            fs::read_dir(path)
                .map_or_else(|error| errno(&error), |entries| json!(entries.count() > 0))
        } else {
            // The first byte only: some are endless, some wait.
            let read = fs::File::options()
                .read(true)
                .open(path)
                .and_then(|mut file| std::io::Read::read(&mut file, &mut [0]));
            read.map_or_else(|error| errno(&error), |count| json!(count > 0))
        };
        json!({
            "directory": metadata.is_dir(),
            "null": metadata.file_type().is_char_device() && metadata.rdev() == 0x103,
            "content": content,
            "write": writable.err().map(|error| error as i32),
        })
    };
    // Waits until something happens when it isn't hidden.
    let hidden = PATHS
        .iter()
        .filter(|path| **path != "/proc/sysrq-trigger" || !Path::new(path).is_file());
    Value::Object(
        hidden
            .map(|path| ((*path).to_owned(), look(path)))
            .collect(),
    )
}

/// Every entry of /dev but those of mounts in it: kind, number, mode, owner, or where it leads.
pub(crate) fn devices() -> Value {
    let mut devices = Map::new();
    let mut folders = vec!["/dev".to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path().display().to_string();
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            let kind = metadata.file_type();
            let mut seen = json!({
                "mode": format!("{:o}", metadata.mode()),
                "owner": [metadata.uid(), metadata.gid()],
            });
            if kind.is_symlink() {
                let leads = fs::read_link(&path).unwrap_or_default();
                seen = json!({ "leads to": leads.display().to_string() });
            } else if kind.is_char_device() || kind.is_block_device() {
                let number = metadata.rdev();
                seen["number"] =
                    json!([nix::sys::stat::major(number), nix::sys::stat::minor(number)]);
                let opened = fs::File::options()
                    .read(true)
                    .write(true)
                    .open(&path)
                    .map_or_else(|error| errno(&error), |_| json!("opened"));
                // A controlling terminal, or none, is not the device's doing.
                if path != "/dev/tty" && path != "/dev/console" && !path.starts_with("/dev/pts/") {
                    seen["open"] = opened;
                }
            } else if kind.is_dir() && path != "/dev/pts" {
                folders.push(path.clone());
            }
            devices.insert(path, seen);
        }
    }
    Value::Object(devices)
}

/// Which kinds of namespace there are, and which are those of process 1.
pub(crate) fn namespaces() -> Value {
    let mut namespaces = Map::new();
    for entry in fs::read_dir("/proc/self/ns")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}")).ok();
        // Whoever may not look at process 1 sees nothing of it.
        namespaces.insert(
            name.clone(),
            json!(of("1").map(|first| Some(first) == of("self"))),
        );
    }
    Value::Object(namespaces)
}

/// Numbers of the open descriptors.
pub(crate) fn descriptors() -> Value {
    let own = fs::File::open("/proc/self/fd");
    let own = own.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    let mut numbers: Vec<i32> = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        // Those through which this is asked.
        .filter(|number| *number < own)
        .collect();
    numbers.sort_unstable();
    json!(numbers)
}
