use super::containerd::version;
use super::files::{arm64_kind, directory, initramfs, initramfs_kind, kernel, x86_64_kind};
use super::host::{cgroups, cpu, kvm};
use super::programs::{erofs_version, ext4_version};
use super::*;
use supermachine_vmm::jail::{Layer, Missing};

use crate::config::{AbsolutePath, Digest};
use crate::virtualization::Virtualization;

#[test]
fn a_kvm_that_emulates_fails_unless_allowed() {
    let kind = |kind, allowed| kvm(Ok(()), kind, allowed).pop().expect("line");
    let native = kind(Virtualization::Native, false);
    assert_eq!((native.status, &*native.found), (Status::Ok, "native"));
    let nested = kind(Virtualization::Nested, false);
    assert!(nested.found.starts_with("nested"));
    let refused = kind(Virtualization::Emulated("no svm"), false);
    assert_eq!(refused.status, Status::Fail);
    assert_eq!(refused.found, "emulating: no svm");
    assert!(refused.advice.expect("advice").contains("lab"));
    let allowed = kind(Virtualization::Emulated("no svm"), true);
    assert_eq!(allowed.status, Status::Warn);
    let absent = kvm(
        Err("/dev/kvm does not exist".into()),
        Virtualization::Native,
        false,
    );
    assert_eq!(absent.len(), 1);
    assert_eq!(absent[0].status, Status::Fail);
}

#[test]
fn a_cpu_without_virtualization_is_a_warning() {
    assert_eq!(cpu("fpu svm").status, Status::Ok);
    assert_eq!(cpu("fpu svm_lock").status, Status::Warn);
    assert_eq!(cpu("").status, Status::Warn);
}

#[test]
fn a_layer_that_is_missing_fails_unless_allowed() {
    let missing = Missing {
        layer: Layer::Landlock,
        reason: "landlock: the kernel has none".into(),
    };
    let status = |allowed: &[Layer]| {
        let lines = confinement::judge(std::slice::from_ref(&missing), allowed);
        assert_eq!(lines.len(), Layer::ALL.len());
        let bad: Vec<_> = lines
            .into_iter()
            .filter(|line| line.status != Status::Ok)
            .collect();
        assert_eq!(bad.len(), 1);
        bad[0].clone()
    };
    assert_eq!(status(&[Layer::Landlock]).status, Status::Warn);
    let failed = status(&[Layer::Pid]);
    assert_eq!(failed.status, Status::Fail);
    assert_eq!(failed.found, "absent: landlock: the kernel has none");
    assert!(
        failed
            .advice
            .expect("advice")
            .contains("\"landlock\" in [jail]")
    );
}

#[test]
fn no_cgroups_is_a_warning() {
    assert_eq!(cgroups("").status, Status::Warn);
}

#[test]
fn versions_are_read_from_what_programs_print() {
    for (text, expected) in [
        (
            "containerd github.com/containerd/containerd/v2 2.1.9+unknown \n",
            (2, 1),
        ),
        (
            "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1",
            (1, 7),
        ),
        ("containerd containerd.io v1.6.20 abc", (1, 6)),
    ] {
        let version = version(text).expect(text);
        assert_eq!((version.major, version.minor), expected);
    }
    assert!(version("something else").is_none());
    assert_eq!(
        erofs_version("mkfs.erofs (erofs-utils) 1.8.6\nmore"),
        "1.8.6"
    );
    assert_eq!(erofs_version("mkfs.erofs 1.5\nusage: …"), "1.5");
    assert_eq!(erofs_version("no such option\n"), "of unknown version");
    assert_eq!(ext4_version("mke2fs 1.47.0 (5-Feb-2023)\n"), "1.47.0");
}

#[test]
fn kernels_are_recognised_and_others_refused() {
    let mut elf = vec![0u8; 64];
    elf[..5].copy_from_slice(b"\x7fELF\x02");
    elf[18] = 62;
    assert_eq!(x86_64_kind(&elf, 64), Ok("ELF"));
    elf[18] = 183;
    assert_eq!(
        x86_64_kind(&elf, 64),
        Err("is an ELF file for machine 183, not x86-64 (62)".to_owned())
    );
    let mut image = vec![0u8; 4096];
    image[0x1f1] = 39;
    image[0x1f4] = 100;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    assert_eq!(x86_64_kind(&image, 40 * 512 + 1600), Ok("bzImage"));
    assert!(x86_64_kind(&image, 4096).is_err_and(|wrong| wrong.contains("cut short")));
    assert!(x86_64_kind(b"", 0).is_err());
    assert!(x86_64_kind(b"\x7fELF", 4).is_err());

    let mut image = vec![0u8; 64];
    assert!(arm64_kind(&image).is_err() && arm64_kind(b"").is_err());
    image[56..60].copy_from_slice(b"ARM\x64");
    assert_eq!(arm64_kind(&image), Ok("Image"));
}

#[test]
fn the_kernels_digest_is_held_against_the_configuration() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut config = Resolved::default();
    config.images.directory = AbsolutePath(root.path().to_path_buf());
    config.kernel.path = AbsolutePath(root.path().join("vmlinux"));
    assert_eq!(kernel(&config).status, Status::Fail);

    let mut elf = vec![0u8; 64];
    elf[..5].copy_from_slice(b"\x7fELF\x02");
    elf[18] = 62;
    std::fs::write(&config.kernel.path.0, elf).expect("write");
    assert_eq!(kernel(&config).status, Status::Ok);

    config.kernel.sha256 = Some(Digest([7; 32]));
    let line = kernel(&config);
    assert_eq!(line.status, Status::Fail);
    assert!(line.found.contains("not 0707"), "{line}");
}

#[test]
fn an_initramfs_is_a_cpio_archive() {
    assert_eq!(initramfs_kind(b"070701000"), Some("cpio"));
    assert_eq!(initramfs_kind(b"\x1f\x8b\x08"), Some("gzip"));
    assert_eq!(initramfs_kind(b"#!/bin/sh"), None);
    assert_eq!(initramfs("/nonexistent".as_ref()).status, Status::Fail);
}

#[test]
fn directories_are_made_and_tried() {
    let root = tempfile::tempdir().expect("tempdir");
    let line = directory("images", &root.path().join("a/b"), true);
    assert_ne!(line.status, Status::Fail, "{line}");
    assert_eq!(
        directory("images", "/proc/nothing".as_ref(), true).status,
        Status::Fail
    );
}

#[test]
fn one_failure_is_enough() {
    let mut report = Report {
        lines: vec![Line::ok("a", "fine"), Line::warn("b", "odd", "look")],
    };
    assert!(report.can_start());
    report.lines.push(Line::fail("c", "absent", "get one"));
    assert!(!report.can_start());
    expect_test::expect![[r#"
        ok    a             fine
        warn  b             odd
                             look
        FAIL  c             absent
                             get one
        No container can start on this host: c.
    "#]]
    .assert_eq(&report.to_string());
}
