//! What a container wrote is in its snapshot once it has stopped: exactly what runc leaves there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rustix::fs::{OFlags, lgetxattr, llistxattr};
use supermachine_tests::bundle::Bundle;
use supermachine_tests::host::Host;
use supermachine_tests::program::Program;
use supermachine_tests::shim::{Shim, new_id};
use supermachine_tests::{BUSYBOX, DEBIAN, RUNC, sha256};

use crate::bad::configured;
use crate::leftovers::leaves_nothing;
use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("changes::as_runc_leaves_them", as_runc_leaves_them),
        world.debian_vm_test("changes::attributes", attributes),
        world.vm_test("changes::several_starts", several_starts),
        world.vm_test("changes::in_a_plain_directory", in_a_plain_directory),
        world.debian_vm_test("changes::nothing", nothing),
        world.vm_test("changes::too_many", too_many),
    ]
}

/// The same host with runc.
fn runc(world: &World) -> Host {
    let mut host = world.host.clone();
    host.runtime = RUNC.to_owned();
    host
}

/// What `ctr snapshots diff` tells: by name, all that tar shows of an entry but the time, and the
/// content of files.
fn diff(world: &World, id: &str, snapshotter: &str) -> Result<BTreeMap<String, String>> {
    let directory = tempfile::tempdir_in(world.files()?)?;
    let archive = directory.path().join("diff.tar");
    let mut command = world
        .host
        .command(&["snapshots", "--snapshotter", snapshotter]);
    command.args([
        "diff",
        "--media-type",
        "application/vnd.oci.image.layer.v1.tar",
        id,
    ]);
    let finished = Program::run(command, world.host.deadline)?;
    ensure!(finished.status.success(), "{}", finished.errors());
    fs::write(&archive, &finished.stdout)?;
    let listed = tar(
        world,
        &archive,
        &["--list", "-vv", "--xattrs", "--numeric-owner"],
    )?;
    let mut entries = BTreeMap::new();
    let mut last = String::new();
    for line in listed.lines() {
        if line.starts_with(' ') {
            // An extended attribute of the entry before.
            let entry: &mut String = entries.entry(last.clone()).or_default();
            entry.push_str(line);
            continue;
        }
        // Type and mode, owner, size or device, date, time, name.
        let words: Vec<&str> = line.split_whitespace().collect();
        let [mode, owner, size, _, _, name @ ..] = words.as_slice() else {
            continue;
        };
        last = name.join(" ");
        entries.insert(last.clone(), format!("{mode} {owner} {size}"));
    }
    let contents = directory.path().join("contents");
    fs::create_dir(&contents)?;
    let to = contents.to_string_lossy().into_owned();
    tar(
        world,
        &archive,
        &["--extract", "--no-same-owner", "--directory", &to],
    )?;
    for (name, entry) in &mut entries {
        let path = contents.join(name.split(" link to ").next().unwrap_or(name));
        if entry.starts_with('-') && path.is_file() {
            let content = fs::read(&path).with_context(|| format!("read {name}"))?;
            entry.push_str(&format!(" {}", content.escape_ascii()));
        }
    }
    Ok(entries)
}

/// Everything in an overlay snapshot's own directory, with all but the times and overlayfs's notes to
/// itself.
fn upper(world: &World, id: &str) -> Result<BTreeMap<String, String>> {
    let command = [
        "snapshots",
        "--snapshotter",
        "overlayfs",
        "mounts",
        "/nowhere",
        id,
    ];
    let mount = world.host.ctr(&command)?.success()?;
    let (_, upper) = mount.split_once("upperdir=").context(mount.clone())?;
    let root = PathBuf::from(upper.split([',', ' ']).next().unwrap_or_default());
    let mut entries = BTreeMap::new();
    let mut left = vec![root.clone()];
    while let Some(path) = left.pop() {
        let it = fs::symlink_metadata(&path)?;
        let kind = it.file_type();
        let mut entry = format!("{:o} {}:{} {}", it.mode(), it.uid(), it.gid(), it.nlink());
        if kind.is_dir() {
            left.extend(
                fs::read_dir(&path)?
                    .map(|it| it.map(|it| it.path()))
                    .collect::<Result<Vec<_>, _>>()?,
            );
            // How many directories are in it is not to be compared on any file system.
            entry = format!("{:o} {}:{}", it.mode(), it.uid(), it.gid());
        } else if kind.is_file() {
            let content = fs::read(&path)?;
            let content = sha256(&content);
            entry.push_str(&format!(" {} {content}", it.len()));
        } else if kind.is_symlink() {
            entry.push_str(&format!(" {}", fs::read_link(&path)?.display()));
        } else if kind.is_char_device() && it.rdev() == 0 {
            // A deletion; overlayfs has one inode for many.
            entry = format!("{:o} {}:{} gone", it.mode(), it.uid(), it.gid());
        } else if kind.is_char_device() || kind.is_block_device() {
            entry.push_str(&format!(" {:x}", it.rdev()));
        }
        entry.push_str(&xattrs(&path)?);
        let name = path.strip_prefix(&root)?.as_os_str().as_bytes();
        entries.insert(name.escape_ascii().to_string(), entry);
    }
    Ok(entries)
}

fn xattrs(path: &Path) -> Result<String> {
    let mut names = vec![0; 1 << 16];
    let length = llistxattr(path, &mut names[..])?;
    let mut found = Vec::new();
    for name in names[..length].split(|byte| *byte == 0) {
        let text = name.escape_ascii().to_string();
        let note = text.starts_with("trusted.overlay.") && text != "trusted.overlay.opaque";
        if name.is_empty() || note {
            continue;
        }
        let mut value = vec![0; 1 << 16];
        let length = lgetxattr(path, name, &mut value[..])?;
        found.push(format!(" {text}={}", value[..length].escape_ascii()));
    }
    found.sort();
    Ok(found.concat())
}

fn tar(world: &World, archive: &Path, how: &[&str]) -> Result<String> {
    let mut command = Command::new("tar");
    command
        .args(how)
        .arg("--file")
        .arg(archive)
        .env("TZ", "UTC");
    Program::run(command, world.host.deadline)?.success()
}

fn equal_maps(found: &BTreeMap<String, String>, expected: &BTreeMap<String, String>) -> Result<()> {
    let mut differences = Vec::new();
    for name in found.keys().chain(expected.keys()) {
        let (found, expected) = (found.get(name), expected.get(name));
        if found != expected {
            differences.push(format!("{name}: {found:?}, runc {expected:?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// What a container said and left.
#[derive(Debug)]
struct Left {
    said: Vec<String>,
    diff: BTreeMap<String, String>,
    upper: BTreeMap<String, String>,
}

/// Runs a program so many times to its end in one container, under both; what is left of ours, which
/// is what is left of runc's.
fn compare(
    world: &World,
    snapshotter: &str,
    image: &str,
    times: u32,
    program: &[&str],
) -> Result<Left> {
    let run = |host: &Host| {
        let mut host = host.clone();
        host.snapshotter = Some(snapshotter.to_owned());
        let (finished, kept) = host.container(image).keep(program)?;
        let mut said = vec![finished.success()?];
        for _ in 1..times {
            said.push(kept.start_again()?.success()?);
        }
        Ok::<_, anyhow::Error>(Left {
            said,
            diff: diff(world, kept.id(), snapshotter)?,
            upper: match snapshotter {
                "overlayfs" => upper(world, kept.id())?,
                _ => BTreeMap::new(),
            },
        })
    };
    let (ours, runcs) = (run(&world.host)?, run(&runc(world))?);
    for (ours, runcs) in ours.said.iter().zip(&runcs.said) {
        equal(ours, runcs)?;
    }
    equal_maps(&ours.diff, &runcs.diff)?;
    equal_maps(&ours.upper, &runcs.upper)?;
    Ok(ours)
}

fn as_runc_leaves_them(world: &World) -> Result<()> {
    let script = r#"
        mkdir -m 1777 /new && echo hello >/new/file && chown 70000:42 /new/file && chmod 4711 /new/file
        ln /new/file /new/other && ln -s ../nowhere /new/soft && ln -s / /root-link
        mknod /new/null c 1 3 && mkfifo -m 600 /new/fifo
        dd if=/dev/zero of=/new/sparse bs=1 count=1 seek=5000000 2>/dev/null
        printf x >"$(printf '/new/\377')" && : >/new/empty
        echo more >>/etc/passwd && chmod 600 /etc/group
        rm /bin/tac && mv /etc /etc2 && mkdir /etc && echo own >/etc/own
        mkdir -p /passing/by && touch /passing/by/file && rm -r /passing
        rm -r /home 2>/dev/null || true; mkdir -p /home && touch /home/new
        chmod 711 /
    "#;
    let left = compare(world, "overlayfs", BUSYBOX, 1, &["sh", "-ec", script])?;
    ensure!(left.diff.len() > 10, "runc has left {left:?}");
    Ok(())
}

/// Of which busybox knows nothing.
fn attributes(world: &World) -> Result<()> {
    // setxattr(2) and lsetxattr(2) of x86_64.
    let script = r#"
        sub set { my ($call, $path, $name, $value) = @_;
            syscall($call, $path, $name, $value, length $value, 0) == 0 or die "$path $name: $!" }
        mkdir "/d"; open my $f, ">", "/d/f"; print $f "content"; close $f;
        set(188, "/d/f", "user.note", "a note");
        set(188, "/d", "user.empty", "");
        set(188, "/d/f", "security.capability", pack("VVVVV", 0x02000001, 0x2000, 0, 0, 0));
        symlink "nowhere", "/d/l"; link "/d/f", "/d/g";
        set(188, "/etc/hostname", "user.of", "a file of the image") if -e "/etc/hostname";
        set(188, "/usr/bin/env", "user.of", "a file of the image");
        set(188, "/var", "user.of", "a directory of the image");
        unlink "/usr/bin/yes"; rename "/usr/bin/tac", "/d/tac" or die $!;
    "#;
    let left = compare(world, "overlayfs", DEBIAN, 1, &["perl", "-e", script])?;
    for (name, xattr) in [
        ("d/f", "user.note=a note"),
        ("d/f", "security.capability="),
        ("usr/bin/env", "user.of=a file of the image"),
    ] {
        let entry = left.upper.get(name);
        ensure!(
            entry.is_some_and(|it| it.contains(xattr)),
            "{name}: {entry:?}"
        );
    }
    Ok(())
}

/// Deletes what an earlier start left, and what the image had, and looks again.
const STORY: &str = r#"
    n=$(cat /count 2>/dev/null || echo 0); n=$((n + 1)); echo $n >/count
    case $n in
    1)  mkdir -p /d/deep /e && touch /d/a /d/b /d/deep/c /e/f && rm /etc/group && rm -r /usr
        echo changed >>/etc/passwd; ln /d/a /d/same;;
    2)  rm /d/a && rm -r /d/deep /e && touch /e && mkdir /usr && touch /usr/own
        mkdir /etc/group && mv /etc/passwd /etc/moved;;
    3)  rm -r /usr /etc/group && mkdir /usr /e2 && echo back >/etc/group;;
    esac
    find / -xdev | grep -v -e '^/proc' -e '^/sys' -e '^/dev' -e '^/run' | sort
    cat /etc/group 2>/dev/null || true
"#;

fn several_starts(world: &World) -> Result<()> {
    compare(world, "overlayfs", BUSYBOX, 3, &["sh", "-c", STORY]).map(drop)
}

fn in_a_plain_directory(world: &World) -> Result<()> {
    compare(world, "native", BUSYBOX, 3, &["sh", "-c", STORY]).map(drop)
}

/// A container that writes nothing leaves its snapshot alone, and so does one that can't.
fn nothing(world: &World) -> Result<()> {
    compare(world, "overlayfs", DEBIAN, 1, &["true"])?;
    let read_only = world.host.container(BUSYBOX).with(&["--read-only"]);
    let (finished, kept) = read_only.keep(&["true"])?;
    finished.success()?;
    equal(diff(world, kept.id(), "overlayfs")?, BTreeMap::new())
}

/// More names than allowed: they are lost, the snapshot is as it was, and the container ends as ever.
fn too_many(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let config = configured(world, &[("changes", "entries", "1000")])?;
        let id = new_id();
        let script = "cd /tmp && seq 1 1200 | xargs touch; exit 3";
        let bundles = world.files()?.join("bundles");
        let bundle = Bundle::new(&bundles, &id, &world.busybox()?, &["sh", "-c", script])?;
        let shim = Shim::start(&config, &id, &bundle.dir)?;
        // Where containerd would read the shim's log.
        let mut log = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(bundle.dir.join("log"))?;
        let mount = shim.overlay(&bundle)?;
        let upper = mount
            .options
            .iter()
            .find_map(|it| it.strip_prefix("upperdir="));
        let upper = PathBuf::from(upper.context("no upper directory")?);
        shim.create(&bundle)?;
        shim.start_task()?;
        let exit = shim.wait();
        let mut said = vec![0; 1 << 16];
        let length = log.read(&mut said).unwrap_or(0);
        said.truncate(length);
        let said = String::from_utf8_lossy(&said);
        equal(
            exit.with_context(|| format!("the shim said {said:?}"))?
                .exit_status,
            3,
        )?;
        ensure!(
            said.contains("is as it was before") && said.contains("limit of 1000 entries"),
            "the shim said {said:?}"
        );
        equal(fs::read_dir(&upper)?.count(), 0)?;
        // And nothing is beside it.
        let beside = upper.parent().context("no parent")?;
        let staged = fs::read_dir(beside)?.filter_map(Result::ok);
        let staged = staged.filter(|entry| entry.file_name().as_bytes().starts_with(b"."));
        equal(staged.count(), 0)?;
        shim.delete().map(drop)
    })
}
