//! The images of the tests and the demo, as OCI archives made here from Debian packages.
//!
//! Format: OCI image layout (image-spec v1.1, image-layout.md) in a tar, as `ctr images import`
//! takes it; the reference is in the index's annotations.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::arch::Arch;
use crate::step::{hex, quiet, sha256_file, step};
use crate::{apt, paths};

/// Counts changes of these recipes that change their result.
const RECIPE: &str = "1";

/// The images: file, reference, command, and how the root file system is made.
pub(crate) const IMAGES: &[Image] = &[
    Image {
        file: "busybox.tar",
        reference: "supermachine.test/busybox:latest",
        command: &["sh"],
        make: busybox,
        configured: false,
    },
    Image {
        file: "debian.tar",
        reference: "supermachine.test/debian:12",
        command: &["bash"],
        make: debian,
        configured: true,
    },
];

/// One image.
pub(crate) struct Image {
    /// The archive's file name.
    pub(crate) file: &'static str,
    /// The name containerd knows it by.
    pub(crate) reference: &'static str,
    command: &'static [&'static str],
    make: fn(&Path, Arch) -> Result<()>,
    /// Its packages' own programs run when it is made: not for another processor.
    configured: bool,
}

impl Image {
    /// The images that can be made here for a processor.
    fn of(arch: Arch) -> impl Iterator<Item = &'static Self> {
        IMAGES
            .iter()
            .filter(move |image| !arch.is_foreign() || !image.configured)
    }
}

/// The folder with the archives, made now where they are missing.
pub(crate) fn ensure(arch: Arch) -> Result<PathBuf> {
    let home = paths::cache()?.join("images");
    let recipe = format!("{RECIPE}-{}", apt::codename()?);
    let dir = home.join(arch.suffixed(&recipe)).join("images");
    let missing = |image: &&Image| !dir.join(image.file).exists();
    if Image::of(arch).any(|image| missing(&image)) {
        let _lock = paths::lock(&home, "build")?;
        paths::make_dir(&dir)?;
        for image in Image::of(arch).filter(missing) {
            step(&format!("image {}", image.reference), || {
                build(image, arch, &dir)
            })?;
        }
    }
    Ok(dir)
}

fn build(image: &Image, arch: Arch, dir: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(dir).context("cannot make a folder for an image")?;
    let root = work.path().join("root");
    (image.make)(&root, arch)?;
    let archive = work.path().join(image.file);
    step("archive", || pack(image, arch, &root, &archive))?;
    fs::rename(&archive, dir.join(image.file)).context("cannot place an image")
}

/// One static busybox with a link for each of its commands.
fn busybox(root: &Path, arch: Arch) -> Result<()> {
    apt::ensure(&["busybox-static"])?;
    for dir in [
        "bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var",
    ] {
        paths::make_dir(&root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))
        .context("cannot open /tmp of an image to all")?;
    let program = root.join("bin/busybox");
    let unpacked = tempfile::tempdir().context("no folder for a package")?;
    let from = if arch.is_foreign() {
        for deb in apt::Suite::of_release(arch)?.download(&["busybox-static"])? {
            apt::unpack(&deb, unpacked.path())?;
        }
        unpacked.path().join("bin/busybox")
    } else {
        PathBuf::from("/bin/busybox")
    };
    fs::copy(&from, &program).context("cannot copy busybox")?;
    // This machine's has the same commands: it is of the same release.
    let names = crate::step::text(Command::new("/bin/busybox").arg("--list"))?;
    for name in names.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name))
            .with_context(|| format!("cannot link {name}"))?;
    }
    let files = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n",
        ),
        ("etc/group", "root:x:0:\nuser:x:1000:\n"),
    ];
    for (name, contents) in files {
        fs::write(root.join(name), contents).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

/// Debian's minimal system of this host's release, installed as its packages want it.
fn debian(root: &Path, _: Arch) -> Result<()> {
    apt::ensure(&["mmdebstrap"])?;
    let codename = apt::codename()?;
    let suite = apt::Suite::open(&codename)?;
    let mut child = Command::new("mmdebstrap")
        .args([
            "--variant=minbase",
            "--mode=root",
            "--quiet",
            "--skip=output/mknod",
        ])
        .args([
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
        ])
        .args(["--dpkgopt=path-exclude=/usr/share/locale/*", &codename])
        .arg(root)
        .arg("-")
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start mmdebstrap")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(suite.sources()?.as_bytes())
            .context("cannot tell mmdebstrap its source")?;
    }
    let status = child.wait().context("cannot wait for mmdebstrap")?;
    if !status.success() {
        bail!("mmdebstrap: {status}");
    }
    // An image doesn't carry this machine's package sources, nor device nodes.
    fs::write(root.join("etc/apt/sources.list"), "").context("cannot empty sources.list")?;
    for dir in ["dev", "var/cache/apt", "var/lib/apt/lists"] {
        paths::remove_dir(&root.join(dir))?;
        paths::make_dir(&root.join(dir))?;
    }
    Ok(())
}

/// A root folder as an OCI archive with one gzip layer.
fn pack(image: &Image, arch: Arch, root: &Path, to: &Path) -> Result<()> {
    let work = to.with_extension("layout");
    let blobs = work.join("blobs/sha256");
    paths::make_dir(&blobs)?;
    let plain = work.join("layer.tar");
    // GNU tar knows owners, links and extended attributes; sorted and dateless, the bytes repeat.
    quiet(
        Command::new("tar")
            .args([
                "--sort=name",
                "--mtime=@0",
                "--numeric-owner",
                "--format=pax",
            ])
            .args(["--pax-option=delete=atime,delete=ctime", "--xattrs", "-C"])
            .arg(root)
            .arg("-cf")
            .arg(&plain)
            .arg("."),
    )?;
    let diff_id = sha256_file(&plain)?;
    let layer = gzip(&plain, &blobs)?;
    fs::remove_file(&plain).context("cannot remove the plain layer")?;

    let config = json!({
        "architecture": arch.debian(),
        "os": "linux",
        "config": {
            "Cmd": image.command,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{diff_id}")] },
    });
    let config = blob(&config, "application/vnd.oci.image.config.v1+json", &blobs)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
    });
    let mut manifest = blob(
        &manifest,
        "application/vnd.oci.image.manifest.v1+json",
        &blobs,
    )?;
    let tag = image.reference.rsplit(':').next().unwrap_or("latest");
    manifest["annotations"] = json!({
        "io.containerd.image.name": image.reference,
        "org.opencontainers.image.ref.name": tag,
    });
    manifest["platform"] = json!({ "architecture": arch.debian(), "os": "linux" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    let write = |name: &str, value: &Value| {
        fs::write(work.join(name), value.to_string())
            .with_context(|| format!("cannot write {name}"))
    };
    write("index.json", &index)?;
    write("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;

    let file = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    let mut archive = tar::Builder::new(file);
    for name in ["oci-layout", "index.json"] {
        archive
            .append_path_with_name(work.join(name), name)
            .context("cannot write an archive")?;
    }
    archive
        .append_dir_all("blobs", work.join("blobs"))
        .context("cannot write an archive")?;
    archive.finish().context("cannot end an archive")
}

/// Compresses the layer to a blob; external, since it is the slow part and gzip is optimized
/// however this program was built.
fn gzip(plain: &Path, blobs: &Path) -> Result<Value> {
    let packed = blobs.join("packed");
    let out = File::create(&packed).context("cannot create a layer")?;
    let status = Command::new("gzip")
        .args(["-n", "-3", "-c"])
        .arg(plain)
        .stdout(out)
        .status()
        .context("cannot start gzip")?;
    if !status.success() {
        bail!("gzip: {status}");
    }
    let digest = sha256_file(&packed)?;
    let size = fs::metadata(&packed).context("no layer")?.len();
    fs::rename(&packed, blobs.join(&digest)).context("cannot name a layer")?;
    Ok(descriptor(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        &digest,
        size,
    ))
}

fn blob(value: &Value, kind: &str, blobs: &Path) -> Result<Value> {
    use sha2::{Digest, Sha256};
    let bytes = value.to_string();
    let digest = hex(&Sha256::digest(bytes.as_bytes()));
    fs::write(blobs.join(&digest), &bytes).context("cannot write a blob")?;
    Ok(descriptor(kind, &digest, bytes.len() as u64))
}

fn descriptor(kind: &str, digest: &str, size: u64) -> Value {
    json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": size })
}
