//! Snapshotters' mounts in, disks out.

use std::path::PathBuf;

use expect_test::expect;
use proptest::prelude::*;
use serde_json::json;

use super::*;

/// The images of a plan, in order, and whether its disks say where each is.
fn images(plan: &Plan) -> Vec<Image> {
    let mut images = Vec::new();
    let mut names = Vec::new();
    for disk in &plan.disks {
        match &disk.source {
            Source::Image(image) => {
                images.push(image.clone());
                names.push(disk.serial.clone());
            }
            Source::Images(several) => {
                assert!(several.len() > 1);
                for NamedImage { name, image } in several {
                    images.push(image.clone());
                    names.push(name.clone());
                }
            }
            Source::Writable { .. } | Source::Own { .. } => continue,
        }
        assert!(disk.read_only);
    }
    assert_eq!(names, plan.rootfs.lower);
    images
}

fn copy(directory: &str) -> Image {
    let directory = directory.into();
    Image::Copy { directory }
}

fn layer(directory: &str) -> Image {
    let directory = directory.into();
    Image::Layer { directory }
}

fn file(file: &str) -> Image {
    let file = file.into();
    Image::File { file }
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        kind: kind.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).into()).collect(),
        target: String::new(),
    }
}

fn read_only_root(plan: &Plan) -> bool {
    let root = plan.guest_spec.root().as_ref();
    root.and_then(|root| root.readonly()).unwrap_or(false)
}

/// What becomes of a root without its images: the disk it writes to, and how it is assembled.
fn rest(plan: &Plan) -> String {
    let mut rootfs = serde_json::to_value(&plan.rootfs).expect("json");
    rootfs.as_object_mut().expect("object").remove("lower");
    let writable = plan.disks.iter().find(|disk| disk.serial == "writable-0");
    format!("{:#}", json!({"rootfs": rootfs, "disk": writable}))
}

#[test]
fn native_snapshots_and_plain_directories_are_copied() {
    let bundle_root = altered(&["root", "path"], json!("/srv/rootfs"));
    let by_path = plan_of(&bundle_root, vec![]).expect("plan");
    assert_eq!(images(&by_path), [copy("/srv/rootfs")]);

    let native = plan_of(CTR_2_1, vec![bind("/snap/3", "rw")]).expect("plan");
    assert_eq!(images(&native), [copy("/snap/3")]);
    assert_eq!(native.rootfs.writable.as_deref(), Some("writable-0"));

    // A view of a committed snapshot never changes, and can't be written to.
    let view = plan_of(CTR_2_1, vec![bind("/snap/2", "ro")]).expect("plan");
    assert_eq!(images(&view), [layer("/snap/2")]);
    assert_eq!((view.disks.len(), &view.rootfs.writable), (1, &None));
    assert!(read_only_root(&view));
}

#[test]
fn an_upper_directory_in_use_becomes_the_topmost_layer() {
    let facts = HostFacts {
        upper_in_use: true,
        ..FACTS
    };
    let create = create(vec![overlay(2)], false);
    let plan = plan(&create, &spec(CTR_2_1), &facts, &Resolved::default()).expect("plan");
    assert!(
        matches!(&images(&plan)[0], Image::Copy { directory } if directory.ends_with("999/fs"))
    );
    assert_eq!(plan.rootfs.lower, ["lower-0", "lower-1", "lower-2"]);
    assert_eq!(plan.disks.len(), 2);
}

#[test]
fn colons_in_layer_paths_are_escaped() {
    let mut mount = overlay(1);
    mount
        .options
        .retain(|option| !option.starts_with("lowerdir"));
    mount.options.push(r"lowerdir=/a\:b:/c\\d".into());
    let plan = plan_of(CTR_2_1, vec![mount]).expect("plan");
    assert_eq!(images(&plan), [layer("/a:b"), layer(r"/c\d")]);
}

#[test]
fn a_blockfile_is_the_disk() {
    let blockfile = mount("ext4", "/blockfile/snapshots/7", &["loop", "rw"]);
    let active = plan_of(CTR_2_1, vec![blockfile]).expect("plan");
    expect![[r#"
        {
          "disk": {
            "read_only": false,
            "serial": "writable-0",
            "source": {
              "own": {
                "file": "/blockfile/snapshots/7"
              }
            }
          },
          "rootfs": {
            "own": false,
            "writable": "writable-0"
          }
        }"#]]
    .assert_eq(&rest(&active));
    assert_eq!((active.disks.len(), read_only_root(&active)), (1, false));

    let view = mount("ext4", "/blockfile/snapshots/7", &["loop", "ro", "noload"]);
    let view = plan_of(CTR_2_1, vec![view]).expect("plan");
    assert!(view.disks[0].read_only && view.rootfs.read_only && read_only_root(&view));
    // The container only reads its root, which is still prepared for it.
    let read_only = altered(&["root", "readonly"], json!(true));
    let device = mount("ext4", "/dev/mapper/thin-7", &[]);
    let read_only = plan_of(&read_only, vec![device]).expect("plan");
    assert!(!read_only.disks[0].read_only && read_only_root(&read_only));
}

/// containerd 2.1: an overlay of directories that are mounts of images.
#[test]
fn mounted_images_are_used_as_they_are() {
    let layers = "/erofs/snapshots/2/fs:/erofs/snapshots/1/fs";
    let mount = mount(
        "overlay",
        "overlay",
        &[
            "workdir=/erofs/snapshots/3/work",
            "upperdir=/erofs/snapshots/3/fs",
            &format!("lowerdir={layers}"),
        ],
    );
    let image = |number| {
        let at = format!("/erofs/snapshots/{number}");
        (
            PathBuf::from(format!("{at}/fs")),
            PathBuf::from(format!("{at}/layer.erofs")),
        )
    };
    let facts = HostFacts {
        images: [image(1), image(2)].into(),
        ..FACTS
    };
    let create = create(vec![mount], false);
    let plan = plan(&create, &spec(CTR_2_1), &facts, &Resolved::default()).expect("plan");
    let files = [2, 1].map(|number| file(&format!("/erofs/snapshots/{number}/layer.erofs")));
    assert_eq!(images(&plan), files);
    assert_eq!(plan.rootfs.writable.as_deref(), Some("writable-0"));
}

/// containerd 2.2, erofs snapshotter: images, then an overlay that names them.
#[test]
fn templates_stack_images() {
    let image = |number: u32| {
        let file = format!("/erofs/snapshots/{number}/layer.erofs");
        mount("erofs", &file, &["ro", "loop"])
    };
    let overlay = |options: &[&str]| mount("format/mkdir/overlay", "overlay", options);
    let on_host = [
        "workdir=/erofs/snapshots/9/work",
        "upperdir=/erofs/snapshots/9/fs",
        "lowerdir={{ overlay 0 2 }}",
    ];
    let mounts = vec![image(3), image(2), image(1), overlay(&on_host)];
    let plan = plan_of(CTR_2_1, mounts.clone()).expect("plan");
    let files = [3, 2, 1].map(|number| file(&format!("/erofs/snapshots/{number}/layer.erofs")));
    assert_eq!(images(&plan), files);
    assert!(matches!(plan.disks[1].source, Source::Writable { .. }));
    assert_eq!(
        super::super::rootfs::upper_directory(&create(mounts, false)),
        Some("/erofs/snapshots/9/fs".into())
    );

    let one = [on_host[0], on_host[1], "lowerdir={{ mount 0 }}"];
    let plan = plan_of(CTR_2_1, vec![image(1), overlay(&one)]).expect("plan");
    assert_eq!(images(&plan), [file("/erofs/snapshots/1/layer.erofs")]);

    let view = vec![image(2), image(1), overlay(&["lowerdir={{ overlay 0 1 }}"])];
    let view = plan_of(CTR_2_1, view).expect("plan");
    assert!(view.rootfs.writable.is_none() && read_only_root(&view));
    let view = plan_of(CTR_2_1, vec![image(1)]).expect("plan");
    assert!(view.rootfs.writable.is_none() && read_only_root(&view));
    let bound = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
    let view = plan_of(CTR_2_1, vec![image(1), bound]).expect("plan");
    assert_eq!(images(&view).len(), 1);
}

/// containerd 2.2, erofs snapshotter with a writable layer of its own.
#[test]
fn templates_make_a_writable_disk() {
    let disk = mount(
        "mkfs/ext4",
        "/erofs/snapshots/9/rwlayer.img",
        &[
            "X-containerd.mkfs.fs=ext4",
            "X-containerd.mkfs.size=67108864",
            "rw",
            "loop",
        ],
    );
    let image = mount("erofs", "/erofs/snapshots/1/layer.erofs", &["ro", "loop"]);
    let overlay = mount(
        "format/mkdir/overlay",
        "overlay",
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0700:7:8",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ mount 1 }}",
        ],
    );
    let plan = plan_of(CTR_2_1, vec![disk.clone(), image, overlay]).expect("plan");
    assert_eq!(images(&plan), [file("/erofs/snapshots/1/layer.erofs")]);
    expect![[r#"
        {
          "disk": {
            "read_only": false,
            "serial": "writable-0",
            "source": {
              "own": {
                "file": "/erofs/snapshots/9/rwlayer.img",
                "make": {
                  "size": 67108864
                }
              }
            }
          },
          "rootfs": {
            "directory": "upper",
            "new_directories": [
              {
                "gid": 0,
                "mode": 493,
                "path": "upper",
                "uid": 0
              },
              {
                "gid": 8,
                "mode": 448,
                "path": "work",
                "uid": 7
              }
            ],
            "own": false,
            "work": "work",
            "writable": "writable-0"
          }
        }"#]]
    .assert_eq(&rest(&plan));

    let bound = mount(
        "format/mkdir/bind",
        "{{ mount 0 }}/upper",
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "rw",
            "rbind",
        ],
    );
    let plan = plan_of(CTR_2_1, vec![disk, bound]).expect("plan");
    assert_eq!(
        (images(&plan).len(), plan.rootfs.directory.as_str()),
        (0, "upper")
    );
    assert_eq!(plan.rootfs.new_directories.len(), 1);
    let message = supermachine_protocol::Rootfs::from(&plan.rootfs);
    assert_eq!(message.single_disk().directory, "upper");
    assert_eq!(message.directories[0].mode, 0o755);
}

#[test]
fn root_mounts_that_are_not_understood_are_refused() {
    let with = |option: &str| {
        let mut mount = overlay(1);
        mount.options.push(option.into());
        vec![mount]
    };
    let mut no_lower = overlay(1);
    no_lower
        .options
        .retain(|option| !option.starts_with("lowerdir"));
    let disk = || mount("ext4", "/disk", &["loop"]);
    let image = |options: &[&str]| mount("erofs", "/layer.erofs", options);
    let over = |options: &[&str]| mount("format/mkdir/overlay", "overlay", options);
    let mkfs = |options: &[&str]| vec![mount("mkfs/ext4", "/disk", options)];
    let made = |path: &str| vec![disk(), image(&[]), over(&[path, "lowerdir={{ mount 1 }}"])];
    let mut nested = overlay(1);
    nested.target = "/var".into();
    let errors: Vec<String> = [
        with("userxattr"),
        with("uidmap=0:1000:1"),
        vec![no_lower],
        vec![mount("xfs", "/dev/loop0", &[])],
        vec![mount("verity/erofs", "/layer.erofs", &[])],
        vec![bind("relative", "rw")],
        vec![overlay(1), overlay(1)],
        vec![nested],
        vec![image(&["ro", "device=/other.erofs"])],
        vec![image(&["X-containerd.dmverity=/layer.dmverity"])],
        vec![mount("ext4", "/disk", &["data=journal"])],
        vec![mount("ext4", "{{ mount 0 }}", &[])],
        vec![image(&[]), over(&["lowerdir={{ mount 1 }}"])],
        vec![image(&[]), over(&["lowerdir={{ fetch 0 }}"])],
        vec![image(&[]), over(&["lowerdir={{ mount 0 }}/part"])],
        vec![disk(), over(&["lowerdir={{ mount 0 }}"])],
        vec![
            disk(),
            image(&[]),
            over(&["lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/u"]),
        ],
        mkfs(&["X-containerd.mkfs.fs=xfs", "X-containerd.mkfs.size=1GiB"]),
        mkfs(&["X-containerd.mkfs.size=1"]),
        mkfs(&["X-containerd.mkfs.size=1GiB", "X-containerd.mkfs.label=a"]),
        mkfs(&["X-containerd.mkfs.size=1GiB", "X-containerd.mkfs.uuid=a"]),
        made("X-containerd.mkdir.path={{ mount 0 }}/a:b"),
        made("X-containerd.mkdir.path=/on/the/host"),
        made("X-containerd.mkdir.path={{ mount 1 }}/a"),
        made("X-containerd.mkdir.mode=0755"),
    ]
    .into_iter()
    .map(|rootfs| plan_of(CTR_2_1, rootfs).expect_err("refused").to_string())
    .collect();
    expect![[r#"
        Overlay option userxattr is not supported in a microVM: layers of a rootless containerd mark deletions in another way
        Overlay option uidmap is not supported in a microVM: ids of files are not mapped
        lowerdir is missing from the container's configuration
        A root file system of type "xfs" is not supported in a microVM: expected bind, overlay, erofs or ext4, of which format/, mkdir/ and mkfs/ may come first
        A root file system of type "verity/erofs" is not supported in a microVM: expected bind, overlay, erofs or ext4, of which format/, mkdir/ and mkfs/ may come first
        source of the bind mount is "relative"; expected an absolute path, or one below {{ mount N }}
        A root file system of 2 mounts is not supported in a microVM: expected one, or a last one of a type format/… that makes use of the others
        Mount of the root file system on "/var" is not supported in a microVM: expected every mount to be for the root itself
        Option "device=/other.erofs" of the erofs mount is not supported in a microVM: what it changes is not known here
        Option "X-containerd.dmverity=/layer.dmverity" of the erofs mount is not supported in a microVM: what it changes is not known here
        Option "data=journal" of the ext4 mount is not supported in a microVM: what it changes is not known here
        source of the ext4 mount is "{{ mount 0 }}"; expected an absolute path, or one below {{ mount N }}
        Mount option lowerdir is "{{ mount 1 }}"; expected numbers of mounts that come before it, counted from 0
        Mount option lowerdir is "{{ fetch 0 }}"; expected {{ mount N }}, {{ overlay N M }}, {{ source N }} or {{ target N }} between text
        A layer that is /part of mount 0 is not supported in a microVM: expected a layer to be a directory or an EROFS image, and what is written to be in directories of one writable ext4
        A layer that is / of mount 0 is not supported in a microVM: expected a layer to be a directory or an EROFS image, and what is written to be in directories of one writable ext4
        workdir is missing from the container's configuration
        X-containerd.mkfs.fs of the mkfs/ext4 mount is "xfs"; expected ext4
        X-containerd.mkfs.size of the mkfs/ext4 mount is "1"; expected a size such as 100MiB, at least 1MiB
        Option "X-containerd.mkfs.label" of the mkfs/ext4 mount is not supported in a microVM: what it changes is not known here
        X-containerd.mkfs.uuid of the mkfs/ext4 mount is "a"; expected a UUID
        X-containerd.mkdir.path of the format/mkdir/overlay mount is "{{ mount 0 }}/a:b"; expected PATH, PATH:MODE or PATH:MODE:UID:GID
        X-containerd.mkdir.path of the format/mkdir/overlay mount is "/on/the/host"; expected a directory on a writable ext4 mount
        X-containerd.mkdir.path of the format/mkdir/overlay mount is "{{ mount 1 }}/a"; expected a directory on a writable ext4 mount
        Option "X-containerd.mkdir.mode=0755" of the format/mkdir/overlay mount is not supported in a microVM: what it changes is not known here"#]].assert_eq(&errors.join("\n"));
}

#[test]
fn sizes_are_as_containerd_writes_them() {
    let size = |text: &str| {
        let option = format!("X-containerd.mkfs.size={text}");
        let plan = plan_of(CTR_2_1, vec![mount("mkfs/ext4", "/disk", &[&option])]);
        match plan.map(|plan| plan.disks[0].source.clone()) {
            Ok(Source::Own { make, .. }) => make.map(|make| make.size >> 20),
            _ => None,
        }
    };
    for (text, mib) in [
        ("67108864", 64),
        ("67108864B", 64),
        ("64MiB", 64),
        ("64 MB", 64),
        ("64m", 64),
        ("65536k", 64),
        ("2GiB", 2048),
        ("1t", 1 << 20),
    ] {
        assert_eq!(size(text), Some(mib), "{text}");
    }
    for text in [
        "",
        "MiB",
        "-1GiB",
        "1.5GiB",
        "1i",
        "1ib",
        "1PiB",
        "99999999999GiB",
        "1GiBs",
    ] {
        assert_eq!(size(text), None, "{text}");
    }
}

#[test]
fn too_many_images_that_cannot_be_merged_are_refused() {
    let mounts = |count: usize| {
        let mut mounts: Vec<Mount> = (0..count)
            .map(|number| mount("erofs", &format!("/layers/{number}.erofs"), &["ro"]))
            .collect();
        let lower = format!("lowerdir={{{{ overlay 0 {} }}}}", count - 1);
        mounts.push(mount("format/overlay", "overlay", &[&lower]));
        mounts
    };
    let most = plan_of(CTR_2_1, mounts(IMAGES_MAX)).expect("plan");
    assert_eq!(images(&most).len(), IMAGES_MAX);
    let error = plan_of(CTR_2_1, mounts(IMAGES_MAX + 1)).expect_err("too many");
    assert!(error.to_string().contains("at most 128 fit"), "{error}");
}

proptest! {
    /// However many layers, each is in exactly one image, in order, only the last image merges, and
    /// one disk holds them all.
    #[test]
    fn every_layer_is_on_a_disk(layers in 1usize..200, upper_in_use: bool) {
        let facts = HostFacts { upper_in_use, ..FACTS };
        let create = create(vec![overlay(layers)], false);
        let plan = plan(&create, &spec(CTR_2_1), &facts, &Resolved::default()).expect("plan");
        let mut found = Vec::new();
        let all = images(&plan);
        let last = all.len() - 1;
        for (index, image) in all.into_iter().enumerate() {
            match image {
                Image::Layer { directory } => found.push(directory),
                Image::MergedLayers { directories } => {
                    prop_assert!(directories.len() > 1);
                    prop_assert_eq!(index, last);
                    found.extend(directories);
                }
                Image::Copy { .. } => prop_assert!(upper_in_use && index == 0),
                Image::File { .. } => prop_assert!(false),
            }
        }
        prop_assert_eq!(plan.disks.len(), 2);
        for disk in &plan.disks {
            prop_assert!(supermachine_protocol::is_disk_serial(&disk.serial));
        }
        prop_assert!(plan.rootfs.lower.len() <= IMAGES_MAX);
        prop_assert_eq!(found.len(), layers);
        for (index, directory) in found.iter().enumerate() {
            let name = format!("snapshots/{}/fs", layers - index);
            prop_assert!(directory.ends_with(&name), "{:?}", directory);
        }
    }

    /// No list of mounts makes the plan panic, or name a place that is none.
    #[test]
    fn any_mounts_are_understood_or_refused(
        mounts in proptest::collection::vec(
            (
                "(format/|mkdir/|mkfs/){0,2}(bind|overlay|erofs|ext4|loop)",
                "(/a|\\{\\{ (mount|source) [0-3] \\}\\}(/u)?)",
                proptest::collection::vec(
                    "ro|loop|(lowerdir|upperdir|workdir|X-containerd\\.mkdir\\.path)=\
                     (/a|\\{\\{ (mount|overlay 0) [0-3] \\}\\}(/u|/w)?)(:0755)?|X-containerd\\.mkfs\\.size=1g",
                    0..6,
                ),
            ),
            1..5,
        ),
    ) {
        let mounts: Vec<Mount> = mounts
            .into_iter()
            .map(|(kind, source, options)| Mount { kind, source, options, target: String::new() })
            .collect();
        let _ = super::super::snapshot::lower_directories(&mounts);
        if let Ok(plan) = plan_of(CTR_2_1, mounts) {
            images(&plan);
            let writable = plan.disks.iter().filter(|disk| disk.serial == "writable-0").count();
            prop_assert_eq!(plan.rootfs.writable.is_some(), writable == 1);
            prop_assert!(!plan.rootfs.lower.is_empty() || plan.rootfs.writable.is_some());
        }
    }
}
