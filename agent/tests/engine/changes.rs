//! What a container wrote, as the agent tells it.

use std::fs;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::json;
use supermachine_protocol::changes::{Attributes, Decoder, Limits, NodeKind, Record, ask};

use crate::harness::*;

const LIMITS: Limits = Limits {
    entries: 1000,
    bytes: 1 << 24,
    depth: 100,
};

pub(crate) const ALL: &[Case] = &[
    ("nothing_written_is_no_change", nothing_written_is_no_change),
    ("changes_of_every_kind", changes_of_every_kind),
    ("deletions_and_renames", deletions_and_renames),
    (
        "nobody_is_told_of_a_running_container",
        nobody_is_told_of_a_running_container,
    ),
];

/// A machine whose snapshot held something of its own, above the image.
fn with_changes(script: &str, test: impl AsyncFnOnce(&Machine, Vec<String>)) -> Outcome {
    let own = Path::new("/run/own");
    for path in [own, Path::new("/run/writable")] {
        let _ = fs::remove_dir_all(path);
        fs::create_dir_all(path).unwrap();
    }
    fs::create_dir_all(own.join("kept")).unwrap();
    fs::write(own.join("kept/mine"), "mine").unwrap();
    fs::write(own.join("kept/mine-too"), "mine").unwrap();
    fs::create_dir_all("/run/image/below/deep").unwrap();
    fs::write("/run/image/below/file", "below").unwrap();
    fs::write("/run/image/below/deep/file", "below").unwrap();
    fs::create_dir_all("/run/image/rename").unwrap();
    fs::write("/run/image/rename/file", "below").unwrap();
    on_machine(async |machine| {
        let ends = machine.ports(false);
        let mut spec = spec(&["sh", "-ec", script]);
        let caps = &mut spec["process"]["capabilities"];
        for set in ["bounding", "effective", "permitted"] {
            let set = caps[set].as_array_mut().unwrap();
            set.extend(["CAP_MKNOD", "CAP_SETFCAP", "CAP_SYS_ADMIN"].map(|cap| json!(cap)));
        }
        let mut request = machine.create_request("c", &spec, &ends);
        let rootfs = request.rootfs.as_mut().unwrap().mut_overlay();
        rootfs.lower_disks.insert(0, "own".to_owned());
        rootfs.own_lower_disk = true;
        rootfs.writable_disk = "writable".to_owned();
        let created = machine.client().create_container(call(), &request).await;
        created.unwrap();
        machine.start_container("c").await.unwrap();
        let errors = text(ends.stderr).await;
        assert_eq!((machine.exit("c", "").await, errors.as_str()), (0, ""));
        let told = told(machine, "c").await;
        test(machine, told).await;
        machine.delete("c").await.unwrap();
    })
}

/// The changes of a container, one in a line.
async fn told(machine: &Machine, id: &str) -> Vec<String> {
    let (socket, id) = (machine.changes(), id.to_owned());
    let read = move || {
        let stream = UnixStream::connect(socket).unwrap();
        ask(&stream, &id).unwrap();
        let mut decoder = Decoder::new(BufReader::new(stream), LIMITS);
        let mut lines = Vec::new();
        while let Some(record) = decoder.next_record().unwrap() {
            let data = String::from_utf8_lossy(decoder.data()).into_owned();
            lines.push(line(&record, data.trim_end_matches('\0')));
        }
        lines
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

fn line(record: &Record, data: &str) -> String {
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let owned = |it: &Attributes| {
        let xattrs = it.xattrs.iter();
        let xattrs: String = xattrs
            .map(|(name, value)| format!(" {}={}", text(name), text(value)))
            .collect();
        format!("{:o} {}:{}{xattrs}", it.mode, it.uid, it.gid)
    };
    let shared = |shared: &bool| if *shared { " shared" } else { "" };
    match record {
        Record::Root { changed, .. } => format!("root changed={changed}"),
        Record::Directory {
            name,
            attributes,
            opaque,
            below,
        } => {
            let name = text(name);
            format!(
                "dir {name} {} opaque={opaque} below={below}",
                owned(attributes)
            )
        }
        Record::Up => "up".to_owned(),
        Record::File {
            name,
            attributes,
            shared: several,
            size,
        } => {
            let (name, owned) = (text(name), owned(attributes));
            format!("file {name} {owned} {size}{}", shared(several))
        }
        Record::Data { offset, length } => format!("data {offset} {length} {data}"),
        Record::Symlink { name, target, .. } => format!("link {} -> {}", text(name), text(target)),
        Record::Node { name, kind, .. } => match kind {
            NodeKind::Character { major, minor } => format!("char {} {major}:{minor}", text(name)),
            other => format!("{other:?} {}", text(name)),
        },
        Record::Link { name, inode } => format!("hard {} {inode}", text(name)),
        Record::Whiteout { name, below } => format!("gone {} below={below}", text(name)),
        Record::End { .. } => "end".to_owned(),
        Record::Failed { reason } => format!("failed: {}", text(reason)),
    }
}

fn nothing_written_is_no_change() -> Outcome {
    with_changes("true", async |machine, told| {
        assert_eq!(told, ["root changed=false", "end"]);
        assert!(!machine.changed("c").await);
    })
}

fn changes_of_every_kind() -> Outcome {
    let script = r#"
        mkdir -m 1777 new && echo hello > new/file && chown 70000:42 new/file && chmod 4711 new/file
        ln new/file new/other && ln -s ../nowhere new/soft
        mknod new/null c 1 3 && mkfifo new/fifo
        dd if=/dev/zero of=new/sparse bs=1 count=1 seek=1048576 2>/dev/null
        printf x > "$(printf 'new/\377')"
    "#;
    with_changes(script, async |machine, told| {
        assert!(machine.changed("c").await);
        let all = told.join("\n");
        for line in [
            "root changed=false",
            "dir new 1777 0:0 opaque=false below=false",
            "file file 4711 70000:42 6 shared\ndata 0 6 hello\n",
            "hard other 0",
            "link soft -> ../nowhere",
            "char null 1:3",
            "Fifo fifo",
            // Only what isn't a hole.
            "file sparse 644 0:0 1048577\ndata 1048576 1 ",
            "file \\xff 644 0:0 1\ndata 0 1 x",
            "up\nend",
        ] {
            assert!(all.contains(line), "{line:?} is not in\n{all}");
        }
    })
}

fn deletions_and_renames() -> Outcome {
    let script = "
        rm below/file kept/mine
        rm -r below/deep && mkdir below/deep && touch below/deep/new
        mkdir twice && touch twice/file && rm -r twice
        mv rename renamed && chmod 700 /
    ";
    with_changes(script, async |_, told| {
        assert_eq!(
            told,
            [
                "root changed=true",
                "dir below 755 0:0 opaque=false below=true",
                "dir deep 755 0:0 opaque=true below=true",
                "file new 644 0:0 0",
                "up",
                "gone file below=true",
                "up",
                "dir kept 755 0:0 opaque=false below=false",
                // Nothing of the image's was there: nothing is to be hidden.
                "gone mine below=false",
                "up",
                "gone rename below=true",
                "dir renamed 755 0:0 opaque=false below=false",
                "file file 644 0:0 5",
                "data 0 5 below",
                "up",
                "end",
            ]
        );
    })
}

fn nobody_is_told_of_a_running_container() -> Outcome {
    on_machine(async |machine| {
        let _ends = machine.run("c", &spec(&["sleep", "1000"])).await;
        let running = told(machine, "c").await;
        assert_eq!(running[1..], ["failed: Container \\\"c\\\" is running"]);
        let unknown = told(machine, "d").await;
        assert_eq!(unknown[1..], ["failed: container \\\"d\\\" does not exist"]);
        machine.signal("c", "", 9, false).await.unwrap();
        machine.exit("c", "").await;
        // Its root is in memory alone.
        let kept = told(machine, "c").await;
        let none = "failed: changes of container \\\"c\\\" does not exist";
        assert_eq!(kept[1..], [none]);
        machine.delete("c").await.unwrap();
    })
}
