//! Every snapshotter, and what images can hold.

mod images;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::Mount;
use libtest_mimic::{Completion, Trial};
use sha2::{Digest, Sha256};
use supermachine_tests::containerd::Containerd;
use supermachine_tests::ctr::Ctr;
use supermachine_tests::host::{Host, unique};
use supermachine_tests::program::Program;
use supermachine_tests::{RUNC, until};

use crate::bad::configured;
use crate::driven;
use crate::support::{World, equal, failed};
use images::{HUNDRED, REUSED, TREES};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    let test = |name: &str, run: fn(&World) -> Result<()>| {
        world.vm_test(&format!("snapshotters::{name}"), run)
    };
    vec![
        test("overlayfs", |world| same_tree(world, "overlayfs")),
        test("native", |world| same_tree(world, "native")),
        test("blockfile", |world| same_tree(world, "blockfile")),
        on_newer(world, "snapshotters::erofs", erofs),
        on_newer(world, "snapshotters::templates", templates),
        test("blockfile_keeps", blockfile_keeps),
        test("hundred_layers_and_full", hundred_layers_and_full),
        test("reused_id", reused_id),
        test("big_layer", big_layer),
    ]
}

/// A test of what containerd has since 2.1.
fn on_newer(world: &World, name: &str, run: fn(&World) -> Result<()>) -> Trial {
    let world = world.clone();
    Trial::ignorable_test(name, move || {
        if world.release.starts_with("1.") || !world.host.is_vm() {
            return Ok(Completion::ignored_with(
                "only in a VM, under containerd 2.1 or later",
            ));
        }
        run(&world).map(|()| Completion::Completed).map_err(failed)
    })
}

/// A containerd with all snapshotters. Its shims log what they do, keep images of their own, and
/// give containers 64 MiB to write to.
#[derive(Debug, Clone)]
pub(crate) struct Snapshots {
    containerd: Arc<Containerd>,
    host: Host,
    /// Where the shims keep images.
    images: PathBuf,
}

impl Snapshots {
    /// The one all tests share.
    fn of(world: &World) -> Result<Self> {
        let mut shared = world
            .snapshots
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshots) = &*shared {
            return Ok(snapshots.clone());
        }
        let snapshots = Self::start(world)?;
        Ok(shared.insert(snapshots).clone())
    }

    fn start(world: &World) -> Result<Self> {
        let files = world.files()?.join("snapshotters");
        fs::create_dir_all(&files)?;
        let scratch = files.join("scratch");
        File::create(&scratch)?.set_len(32 << 20)?;
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-F", "-m", "0"]).arg(&scratch);
        Program::run(mkfs, world.host.deadline)?.success()?;
        // Its erofs snapshotter is there only if the file system is; a kernel may have it built in.
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("erofs");
        let _ = Program::run(modprobe, world.host.deadline);
        let differ = match world.release.starts_with("1.") {
            true => String::new(),
            false => "[plugins.\"io.containerd.service.v1.diff-service\"]\n  \
                      default = [\"erofs\", \"walking\"]\n"
                .to_owned(),
        };
        let more = format!(
            "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n  scratch_file = {:?}\n{differ}",
            scratch.display().to_string()
        );
        let (images, config) = shim_configuration(world, &files.join("images"))?;
        let config = config.to_str().context("a path is UTF-8")?;
        let env = [("SUPERMACHINE_CONFIG", config)];
        let containerd = Containerd::configured(Path::new("containerd"), &env, &more)?;
        let host = Host {
            ctr: Ctr::new("ctr", containerd.address()),
            containerd: None,
            ..world.host.clone()
        };
        Ok(Self {
            containerd: Arc::new(containerd),
            host,
            images,
        })
    }

    /// With this snapshotter, and an image of [`images`].
    fn host(&self, world: &World, snapshotter: &str, image: &images::Image) -> Result<Host> {
        image.import(world, &self.host)?;
        Ok(Host {
            snapshotter: Some(snapshotter.to_owned()),
            ..self.host.clone()
        })
    }

    fn image_count(&self) -> Result<usize> {
        let names = fs::read_dir(&self.images)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter(|name| name.ends_with(".erofs")).count())
    }
}

/// The configuration of the shims, with images in a folder of their own.
fn shim_configuration(world: &World, images: &Path) -> Result<(PathBuf, PathBuf)> {
    let directory = format!("{:?}", images.display().to_string());
    let changes = [
        ("images", "directory", directory.as_str()),
        ("rootfs", "writable_size", "\"64MiB\""),
        ("log", "level", "\"info\""),
    ];
    let config = configured(world, &changes)?.config;
    Ok((images.to_path_buf(), config.context("no configuration")?))
}

/// What a container sees of an image's files is what it sees under runc, attribute by attribute.
fn same_tree(world: &World, snapshotter: &str) -> Result<()> {
    let host = Snapshots::of(world)?.host(world, snapshotter, &TREES)?;
    let tree = |runtime: &str| -> Result<String> {
        let host = Host {
            runtime: runtime.to_owned(),
            ..host.clone()
        };
        let finished = host
            .container(TREES.name)
            .run(&["/probe", "--tree", "/data"])?;
        let tree = finished.success().with_context(|| runtime.to_owned())?;
        // The native snapshotter copies directories for each container, at that time.
        Ok(match snapshotter {
            "native" => tree.lines().map(|line| timeless(line) + "\n").collect(),
            _ => tree,
        })
    };
    let (mut theirs, ours) = (tree(RUNC)?, tree(&host.runtime)?);
    let is_whole = |tree: &str| tree.lines().count() > images::TREE_FILES;
    if !is_whole(&theirs) {
        // ctr throws away what it hasn't read when it hears of the exit; runc's shim doesn't wait.
        theirs = tree(RUNC)?;
    }
    ensure!(is_whole(&theirs), "runc shows only:\n{theirs}");
    let only = |one: &str, other: &str, mark: &str| -> String {
        let known: Vec<&str> = other.lines().collect();
        let lines = one.lines().filter(|line| !known.contains(line));
        lines.map(|line| format!("{mark} {line}\n")).collect()
    };
    let differences = only(&theirs, &ours, "-") + &only(&ours, &theirs, "+");
    ensure!(
        differences.is_empty(),
        "{snapshotter}: runc's (-), ours (+):\n{differences}"
    );
    equal(ours.lines().count(), theirs.lines().count())
}

/// Without the time of a directory.
fn timeless(line: &str) -> String {
    match line.split_once(" time=") {
        Some((before, after)) if before.contains("mode=40") => {
            let rest = after.split_once(' ').map_or("", |(_, rest)| rest);
            format!("{before} {rest}")
        }
        _ => line.to_owned(),
    }
}

/// The same, and the snapshotter's images are used as they are.
fn erofs(world: &World) -> Result<()> {
    let snapshots = Snapshots::of(world)?;
    fs::create_dir_all(&snapshots.images)?;
    let before = snapshots.image_count()?;
    same_tree(world, "erofs")?;
    equal(snapshots.image_count()?, before)
}

/// As containerd 2.2 and later describe an erofs snapshot with a writable layer of its own: images, a
/// disk that we are to make, and an overlay that names them. What was written is on that disk.
fn templates(world: &World) -> Result<()> {
    let files = world.files()?.join("templates");
    let upper = files.join("upper");
    fs::create_dir_all(upper.join("etc"))?;
    fs::write(upper.join("etc/passwd"), "of the upper image\n")?;
    let mount = |kind: &str, source: &Path, options: &[&str]| Mount {
        type_: kind.to_owned(),
        source: source.display().to_string(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    };
    let image = |name: &str, from: &Path| -> Result<Mount> {
        let file = files.join(name);
        let mut mkfs = Command::new("mkfs.erofs");
        mkfs.arg("--quiet").arg(&file).arg(from);
        Program::run(mkfs, world.host.deadline)?.success()?;
        Ok(mount("erofs", &file, &["ro", "loop"]))
    };
    let disk = files.join("rwlayer.img");
    let make = [
        "X-containerd.mkfs.fs=ext4",
        "X-containerd.mkfs.size=32MiB",
        "rw",
        "loop",
    ];
    let mounts = vec![
        mount("mkfs/ext4", &disk, &make),
        image("upper.erofs", &upper)?,
        image("lower.erofs", &world.busybox()?)?,
        mount(
            "format/mkdir/overlay",
            Path::new("overlay"),
            &[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                "lowerdir={{ overlay 1 2 }}",
            ],
        ),
    ];
    let script =
        "test -e /kept && exit 4; grep -q upper /etc/passwd && echo kept > /kept && exit 3";
    for status in [3, 4] {
        let (shim, _bundle) = driven::shim(world, &["sh", "-c", script])?;
        shim.create_with(|request| request.rootfs = mounts.clone())?;
        shim.start_task()?;
        equal(shim.wait()?.exit_status, status)?;
        shim.delete()?;
        equal(read_on(world, &disk, "/upper/kept")?.as_str(), "kept\n")?;
    }
    Ok(())
}

/// A file of an ext4 that nobody has mounted.
fn read_on(world: &World, disk: &Path, path: &str) -> Result<String> {
    let mut debugfs = Command::new("debugfs");
    debugfs.args(["-R", &format!("cat {path}")]).arg(disk);
    Ok(Program::run(debugfs, world.host.deadline)?.text())
}

/// What was written to a blockfile is in it when the task is gone, and there at the next start.
fn blockfile_keeps(world: &World) -> Result<()> {
    let host = Snapshots::of(world)?.host(world, "blockfile", &TREES)?;
    let id = unique("blockfile");
    let script = "cat /kept 2>/dev/null || { echo first > /kept; mkdir /new; echo wrote; }";
    let container = host
        .container(TREES.name)
        .named(&id)
        .detach(&["sh", "-c", script])?;
    let file = snapshot_source(&host, "blockfile", &id)?;
    ensure!(
        !loop_devices()?.contains(&file),
        "{} is mounted on the host",
        file.display()
    );
    until(&format!("{id} to stop"), host.deadline, || {
        Ok(host.status(&id)?.is_some_and(|status| status == "STOPPED"))
    })?;
    host.ctr(&["tasks", "delete", &id])?.success()?;
    equal(read_on(world, &file, "/kept")?.as_str(), "first\n")?;
    let again = Program::start(host.command(&["tasks", "start", &id]), host.deadline)?;
    equal(again.finish()?.success()?.as_str(), "first")?;
    drop(container);
    Ok(())
}

/// The file that a snapshot is, by the mount that containerd says.
fn snapshot_source(host: &Host, snapshotter: &str, key: &str) -> Result<PathBuf> {
    let mounts = host.ctr(&[
        "snapshots",
        "--snapshotter",
        snapshotter,
        "mounts",
        "/at",
        key,
    ])?;
    let mounts = mounts.success()?;
    let mut words = mounts.split_whitespace();
    let source = words.find(|word| word.starts_with('/'));
    Ok(source
        .with_context(|| format!("no file in {mounts:?}"))?
        .into())
}

fn loop_devices() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for device in fs::read_dir("/sys/block")? {
        if let Ok(file) = fs::read_to_string(device?.path().join("loop/backing_file")) {
            files.push(PathBuf::from(file.trim_end()));
        }
    }
    Ok(files)
}

/// A hundred layers need one disk; and the disk that is written to is full when it is.
fn hundred_layers_and_full(world: &World) -> Result<()> {
    let host = Snapshots::of(world)?.host(world, "overlayfs", &HUNDRED)?;
    let script = "ls /layers | wc -l; cat /top; ls /sys/block | grep -c ^vd
        dd if=/dev/zero of=/fill bs=1M 2>&1 | grep -o 'No space left on device'
        rm /fill; echo after > /after; cat /after";
    let said = host
        .container(HUNDRED.name)
        .run(&["sh", "-c", script])?
        .success()?;
    equal(said.as_str(), "100\n100\n2\nNo space left on device\nafter")
}

/// A snapshot's id that is used again, as after a containerd lost its data, shows the new content.
fn reused_id(world: &World) -> Result<()> {
    let files = world.files()?.join("reused");
    let (_, config) = shim_configuration(world, &files)?;
    let config = config.to_str().context("a path is UTF-8")?;
    let env = [("SUPERMACHINE_CONFIG", config)];
    let mut containerd = Containerd::start(Path::new("containerd"), &env)?;
    let host = Host {
        ctr: Ctr::new("ctr", containerd.address()),
        containerd: None,
        snapshotter: Some("overlayfs".to_owned()),
        ..world.host.clone()
    };
    let root = containerd
        .root()
        .join("io.containerd.snapshotter.v1.overlayfs");
    for (image, content) in REUSED {
        image.import(world, &host)?;
        // The second layer's, in both cases.
        equal(
            fs::read_to_string(root.join("snapshots/2/fs/which"))?.as_str(),
            content,
        )?;
        let said = host
            .container(image.name)
            .run(&["cat", "/which"])?
            .success()?;
        equal(said.as_str(), content)?;
        host.ctr(&["images", "rm", "--sync", image.name])?
            .success()?;
        containerd.stop()?;
        fs::remove_dir_all(&root)?;
        containerd.restart()?;
    }
    Ok(())
}

/// The log tells how far the image of a gigabyte is.
fn big_layer(world: &World) -> Result<()> {
    const MIB: usize = 1 << 20;
    let snapshots = Snapshots::of(world)?;
    let root = world.files()?.join("big");
    Command::new("cp")
        .arg("-a")
        .arg(world.busybox()?)
        .arg(&root)
        .status()?;
    let mut block: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8).collect();
    let mut big = File::create(root.join("big"))?;
    for number in 0..1024_u32 {
        block[..4].copy_from_slice(&number.to_le_bytes());
        big.write_all(&block)?;
    }
    drop(big);
    // A hole reads as zeroes.
    let sparse = File::create(root.join("sparse"))?;
    sparse.set_len(3 * MIB as u64)?;
    let hash = |bytes: &[u8]| -> String {
        Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let path = root.to_str().context("a path is UTF-8")?;
    let script =
        "PATH=/bin; stat -c %s /big; tail -c 1048576 /big | sha256sum; sha256sum < /sparse";
    let container = snapshots.host.container(path).with(&["--rootfs"]);
    let said = container.run(&["/bin/sh", "-c", script])?.success();
    fs::remove_dir_all(&root)?;
    let expected = format!(
        "{}\n{}  -\n{}  -",
        1024 * MIB,
        hash(&block),
        hash(&vec![0; 3 * MIB])
    );
    equal(said?.as_str(), expected.as_str())?;
    let log = snapshots.containerd.log();
    let told = log.lines().any(|line| {
        line.contains("Making an image") && line.contains(path) && line.contains("of_mib=10")
    });
    if !told {
        bail!("no word of {path} in the log:\n{log}");
    }
    Ok(())
}
