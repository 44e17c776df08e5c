//! Root file systems of many disks, of parts of disks, and of a directory of one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use supermachine_protocol::{Directory, Partition, Rootfs, ttrpc};

use crate::harness::*;

pub(crate) const ALL: &[Case] = &[
    ("a_hundred_layers", a_hundred_layers),
    ("a_directory_of_a_disk", a_directory_of_a_disk),
    ("roots_that_cannot_be", roots_that_cannot_be),
];

fn partition(name: &str, disk: &str) -> Partition {
    let mut partition = Partition::new();
    partition.name = name.to_owned();
    partition.disk = disk.to_owned();
    partition.length = 4096;
    partition
}

fn directory(path: &str) -> Directory {
    let mut directory = Directory::new();
    directory.path = path.to_owned();
    (directory.mode, directory.uid, directory.gid) = (0o710, 7, 8);
    directory
}

/// What a shell says in a container with this root.
async fn say(machine: &Machine, rootfs: Rootfs, script: &str) -> String {
    let mut ends = machine.ports(false);
    let mut request = machine.create_request("a", &spec(&["sh", "-c", script]), &ends);
    request.rootfs = Some(rootfs).into();
    let created = machine.client().create_container(call(), &request).await;
    created.unwrap();
    machine.start_container("a").await.unwrap();
    ends.close_stdin();
    let said = text(ends.stdout.take()).await;
    assert_eq!(machine.exit("a", "").await, 0);
    machine.delete("a").await.unwrap();
    said
}

fn a_hundred_layers() -> Outcome {
    let mut rootfs = Rootfs::new();
    for layer in 0..100 {
        let (disk, name) = (format!("disk-{layer}"), format!("part-{layer}"));
        let path = Path::new("/run").join(&disk);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join(format!("file-{layer}")), "").unwrap();
        fs::write(path.join("top"), layer.to_string()).unwrap();
        rootfs.partitions.push(partition(&name, &disk));
        rootfs.mut_overlay().lower_disks.push(name);
    }
    rootfs.mut_overlay().lower_disks.push("image".to_owned());
    on_machine(async |machine| {
        let said = say(machine, rootfs, "ls / | grep -c file-; cat /top").await;
        assert_eq!(said, "100\n0");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains("part-"), "{mounts}");
    })
}

fn a_directory_of_a_disk() -> Outcome {
    fs::create_dir_all("/run/whole").unwrap();
    let copy = Command::new("cp")
        .args(["-a", "/run/image", "/run/whole/inner"])
        .status();
    assert!(copy.unwrap().success());
    let mut rootfs = Rootfs::new();
    let disk = rootfs.mut_single_disk();
    disk.serial = "whole".to_owned();
    disk.fstype = "ext4".to_owned();
    disk.directory = "inner".to_owned();
    rootfs.directories = vec![directory("inner/made"), directory("inner")];
    on_machine(async |machine| {
        let said = say(machine, rootfs, "ls -d /made /inner; echo new > /made/file").await;
        assert_eq!(said, "/made\n");
        let made = fs::metadata("/run/whole/inner/made").unwrap();
        assert_eq!(
            (made.mode() & 0o7777, made.uid(), made.gid()),
            (0o710, 7, 8)
        );
        let written = fs::read_to_string("/run/whole/inner/made/file").unwrap();
        assert_eq!(written, "new\n");
    })
}

fn roots_that_cannot_be() -> Outcome {
    on_machine(async |machine| {
        let ends = machine.ports(false);
        let refused = async |change: fn(&mut Rootfs), reason: &str| {
            let mut request = machine.create_request("a", &spec(&["true"]), &ends);
            change(request.rootfs.mut_or_insert_default());
            let answer = machine.client().create_container(call(), &request).await;
            let Err(ttrpc::Error::RpcStatus(status)) = answer else {
                panic!("{answer:?}")
            };
            assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);
            assert!(status.message.contains(reason), "{}", status.message);
        };
        let outside = "not a plain relative path";
        refused(|root| root.directories = vec![directory("../out")], outside).await;
        refused(|root| root.directories = vec![directory("/out")], outside).await;
        refused(|root| root.mut_overlay().upper = "a,b".to_owned(), outside).await;
        refused(|root| root.mut_overlay().work = "./w".to_owned(), outside).await;
        let twice = |root: &mut Rootfs| {
            root.partitions = vec![partition("a", "image"), partition("b", "image")];
        };
        refused(twice, "overlaps").await;
        assert_eq!(machine.output("a", &spec(&["true"])).await.2, 0);
    })
}
