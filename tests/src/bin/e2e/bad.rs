//! What an administrator, containerd or a host may get wrong: each is an error that names it, after
//! which nothing is left.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::Mount;
use libtest_mimic::Trial;
use supermachine_tests::bundle::{Bundle, spec};
use supermachine_tests::shim::{Event, Shim, ShimConfig, new_id, refusal};
use ttrpc::Code;

use crate::driven::shim;
use crate::initramfs;
use crate::leftovers::{freeze, leaves_nothing};
use crate::support::{World, equal};

const DEFAULT_CONFIG: &str = "/etc/supermachine/config.toml";
const DEFAULT_KERNEL: &str = "/usr/local/share/supermachine/vmlinux";
const DEFAULT_INITRAMFS: &str = "/usr/local/share/supermachine/initramfs.cpio";
const DEFAULT_VMM: &str = "/usr/local/libexec/supermachine-vmm";

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("bad::kernel_missing", kernel_missing),
        world.vm_test("bad::vmm_missing", vmm_missing),
        world.vm_test("bad::vmm_that_is_another_program", vmm_foreign),
        world.vm_test("bad::kernel_truncated", kernel_truncated),
        world.vm_test("bad::kernel_of_another_architecture", kernel_foreign),
        world.vm_test("bad::kernel_that_is_text", kernel_text),
        world.vm_test("bad::kernel_with_another_checksum", kernel_checksum),
        world.vm_test("bad::kvm_absent", kvm_absent),
        world.vm_test("bad::kvm_forbidden", kvm_forbidden),
        world.vm_test("bad::kvm_only_emulating", kvm_only_emulating),
        world.vm_test("bad::no_bundle", no_bundle),
        world.vm_test("bad::no_config_json", no_config_json),
        world.vm_test("bad::malformed_config_json", malformed_config_json),
        world.vm_test("bad::rootfs_mount_not_there", rootfs_not_there),
        world.vm_test("bad::unknown_key", unknown_key),
        world.vm_test("bad::value_out_of_range", value_out_of_range),
        world.vm_test("bad::value_of_another_type", value_of_another_type),
        world.vm_test("bad::configuration_not_there", configuration_not_there),
        world.vm_test("bad::command_not_found", command_not_found),
        world.vm_test("bad::agent_never_answers", agent_never_answers),
        world.vm_test("bad::agent_stops_answering", agent_stops_answering),
    ]
}

/// The configuration the other tests use.
pub(crate) fn configuration() -> Result<toml::Table> {
    let path = std::env::var_os("SUPERMACHINE_CONFIG");
    let path = path.map_or_else(|| PathBuf::from(DEFAULT_CONFIG), PathBuf::from);
    if !path.exists() {
        return Ok(toml::Table::new());
    }
    Ok(fs::read_to_string(&path)?.parse()?)
}

/// That configuration with `section.key` set to a TOML value, as a file of its own.
pub(crate) fn configured(world: &World, changes: &[(&str, &str, &str)]) -> Result<ShimConfig> {
    let mut table = configuration()?;
    for (section, key, value) in changes {
        let value: toml::Table = format!("value = {value}").parse()?;
        let value = value.get("value").context("no value")?.clone();
        let section = table
            .entry((*section).to_owned())
            .or_insert_with(|| toml::Table::new().into())
            .as_table_mut()
            .context("not a section")?;
        section.insert((*key).to_owned(), value);
    }
    written(world, &table.to_string())
}

fn written(world: &World, text: &str) -> Result<ShimConfig> {
    let path = world.files()?.join(format!("{}.toml", new_id()));
    fs::write(&path, text)?;
    Ok(ShimConfig {
        config: Some(path),
        ..world.shim()?
    })
}

/// The kernel of the installation.
pub(crate) fn kernel() -> Result<PathBuf> {
    installed("kernel", "path", DEFAULT_KERNEL)
}

/// The installation's initramfs, which has the agent.
pub(crate) fn agent() -> Result<PathBuf> {
    installed("kernel", "initramfs", DEFAULT_INITRAMFS)
}

/// What the shim executes as a machine's process.
pub(crate) fn vmm() -> Result<PathBuf> {
    installed("vm", "program", DEFAULT_VMM)
}

fn installed(section: &str, key: &str, default: &str) -> Result<PathBuf> {
    let configuration = configuration()?;
    let path = configuration
        .get(section)
        .and_then(|section| section.get(key));
    Ok(path
        .and_then(|path| path.as_str())
        .unwrap_or(default)
        .into())
}

/// Creates a container that must be refused, by `shim start` or by Create; what was said.
fn refused(world: &World, config: &ShimConfig) -> Result<String> {
    let mut said = String::new();
    leaves_nothing(world, || {
        let id = new_id();
        let bundles = world.files()?.join("bundles");
        let bundle = Bundle::new(&bundles, &id, &world.busybox()?, &["true"])?;
        said = match Shim::start(config, &id, &bundle.dir) {
            Ok(shim) => refusal(shim.create(&bundle))?.1,
            Err(error) => format!("{error:#}"),
        };
        Ok(())
    })?;
    Ok(said)
}

fn names(said: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(said.contains(part), "{part:?} is not in the error: {said}");
    }
    Ok(())
}

/// A kernel of these bytes is refused with an error that holds `parts`.
fn bad_kernel(world: &World, bytes: &[u8], parts: &[&str]) -> Result<()> {
    let path = world.files()?.join(new_id());
    fs::write(&path, bytes)?;
    let quoted = format!("{:?}", path.display().to_string());
    let config = configured(world, &[("kernel", "path", &quoted)])?;
    names(&refused(world, &without_checksum(config)?)?, parts)
}

/// So that what is wrong with the file is found, not that it is another.
fn without_checksum(config: ShimConfig) -> Result<ShimConfig> {
    let path = config.config.as_ref().context("no configuration")?;
    let mut table: toml::Table = fs::read_to_string(path)?.parse()?;
    if let Some(kernel) = table
        .get_mut("kernel")
        .and_then(|kernel| kernel.as_table_mut())
    {
        kernel.remove("sha256");
    }
    fs::write(path, table.to_string())?;
    Ok(config)
}

fn kernel_missing(world: &World) -> Result<()> {
    let config = configured(world, &[("kernel", "path", "\"/no/such/vmlinux\"")])?;
    names(&refused(world, &config)?, &["kernel", "/no/such/vmlinux"])
}

fn vmm_missing(world: &World) -> Result<()> {
    let config = configured(world, &[("vm", "program", "\"/no/such/vmm\"")])?;
    names(&refused(world, &config)?, &["/no/such/vmm", "No such file"])
}

fn vmm_foreign(world: &World) -> Result<()> {
    let config = configured(world, &[("vm", "program", "\"/bin/true\"")])?;
    names(&refused(world, &config)?, &["/bin/true", "VMM"])
}

fn kernel_truncated(world: &World) -> Result<()> {
    let mut start = Vec::new();
    File::open(kernel()?)?
        .take(100_000)
        .read_to_end(&mut start)?;
    bad_kernel(world, &start, &["truncated", "100000"])
}

fn kernel_foreign(world: &World) -> Result<()> {
    let mut start = Vec::new();
    File::open(kernel()?)?
        .take(100_000)
        .read_to_end(&mut start)?;
    let foreign = if start.starts_with(b"\x7fELF") {
        // e_machine of ELF: AArch64.
        start[18..20].copy_from_slice(&183u16.to_le_bytes());
        start
    } else {
        // The magic of an arm64 Image, at its place.
        let mut image = vec![0; 4096];
        image[56..60].copy_from_slice(b"ARM\x64");
        image
    };
    bad_kernel(world, &foreign, &["expected x86_64"])
}

fn kernel_text(world: &World) -> Result<()> {
    bad_kernel(
        world,
        &[b'x'; 5000],
        &["expected an ELF vmlinux or a bzImage"],
    )
}

fn kernel_checksum(world: &World) -> Result<()> {
    let other = format!("\"{}\"", "0".repeat(64));
    let config = configured(world, &[("kernel", "sha256", &other)])?;
    let said = refused(world, &config)?;
    names(
        &said,
        &["SHA-256", &"0".repeat(64), &kernel()?.display().to_string()],
    )
}

/// Runs the shim in a mount namespace in which `script` has changed something.
fn elsewhere(world: &World, script: &str) -> Result<ShimConfig> {
    let script = format!("{script} && exec \"$@\"");
    let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    Ok(ShimConfig {
        wrapper: wrapper.map(str::to_owned).to_vec(),
        ..world.shim()?
    })
}

fn kvm_absent(world: &World) -> Result<()> {
    // A /dev with all but it.
    let script = "mkdir -p /run/supermachine-tests-dev \
        && mount --bind /dev /run/supermachine-tests-dev \
        && mount -t tmpfs -o mode=755 tmpfs /dev \
        && for d in null zero urandom random; do touch /dev/$d \
        && mount --bind /run/supermachine-tests-dev/$d /dev/$d || exit 1; done";
    let said = refused(world, &elsewhere(world, script)?)?;
    fs::remove_dir("/run/supermachine-tests-dev").context("remove a mount point")?;
    names(&said, &["/dev/kvm", "does not exist"])
}

fn kvm_forbidden(world: &World) -> Result<()> {
    // The same device on a file system without devices, which even root may not open.
    let script = "mkdir -p /run/supermachine-tests-dev \
        && mount -t tmpfs -o nodev tmpfs /run/supermachine-tests-dev \
        && mknod /run/supermachine-tests-dev/kvm c 10 232 \
        && mount --bind /run/supermachine-tests-dev/kvm /dev/kvm";
    let said = refused(world, &elsewhere(world, script)?)?;
    fs::remove_dir("/run/supermachine-tests-dev").context("remove a mount point")?;
    names(&said, &["/dev/kvm", "may not be opened"])
}

/// A processor without virtualization, as /proc/cpuinfo tells of it.
fn kvm_only_emulating(world: &World) -> Result<()> {
    let script = "sed -E 's/ (svm|vmx)( |$)/ /' /proc/cpuinfo > /run/supermachine-tests-cpuinfo \
        && mount --bind /run/supermachine-tests-cpuinfo /proc/cpuinfo";
    let refusing = elsewhere(world, script)?;
    let said = refused(world, &refusing)?;
    names(&said, &["/dev/kvm only emulates", "/proc/cpuinfo", "svm"])?;
    // Where it is allowed, something else stands in the way next.
    let allowing = configured(
        world,
        &[
            ("vm", "allow_emulated_kvm", "true"),
            ("kernel", "path", "\"/no/such/vmlinux\""),
        ],
    )?;
    let allowing = ShimConfig {
        wrapper: refusing.wrapper,
        ..allowing
    };
    let said = refused(world, &allowing);
    fs::remove_file("/run/supermachine-tests-cpuinfo").context("remove a file")?;
    names(&said?, &["/no/such/vmlinux"])
}

/// Create in a bundle that `spoil` has changed since the shim started.
fn bad_bundle(
    world: &World,
    parts: &[&str],
    spoil: impl FnOnce(&Bundle) -> Result<()>,
) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &["true"])?;
        spoil(&bundle)?;
        let (code, message) = refusal(shim.create(&bundle))?;
        ensure!(
            matches!(code, Code::NOT_FOUND | Code::INVALID_ARGUMENT),
            "code {code:?}: {message}"
        );
        names(&message, parts)
    })
}

fn no_bundle(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, _bundle) = shim(world, &["true"])?;
        let created = shim.create_with(|request| request.bundle = "/no/such/bundle".to_owned());
        let (code, message) = refusal(created)?;
        ensure!(
            matches!(code, Code::NOT_FOUND | Code::INVALID_ARGUMENT),
            "code {code:?}: {message}"
        );
        names(&message, &["/no/such/bundle"])
    })
}

fn no_config_json(world: &World) -> Result<()> {
    bad_bundle(world, &["config.json"], |bundle| {
        Ok(fs::remove_file(bundle.dir.join("config.json"))?)
    })
}

fn malformed_config_json(world: &World) -> Result<()> {
    for text in ["{", "[]", r#"{"ociVersion": 7}"#, "\0\0\0"] {
        bad_bundle(world, &["config.json"], |bundle| {
            Ok(fs::write(bundle.dir.join("config.json"), text)?)
        })
        .with_context(|| format!("config.json of {text:?}"))?;
    }
    // Well-formed, and without a process.
    bad_bundle(world, &["process"], |bundle| {
        let mut spec = spec("x", &[]);
        if let Some(spec) = spec.as_object_mut() {
            spec.remove("process");
        }
        bundle.write_config(&spec)
    })
}

fn rootfs_not_there(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &["true"])?;
        let upper = bundle.dir.join("upper");
        fs::create_dir(&upper)?;
        let mount = Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                "lowerdir=/no/such/layer".to_owned(),
                format!("upperdir={}", upper.display()),
                format!("workdir={}", upper.display()),
            ],
            ..Mount::default()
        };
        let (_, message) = refusal(shim.create_with(|request| request.rootfs = vec![mount]))?;
        names(&message, &["/no/such/layer"])
    })
}

/// The error names the file, the line, the key, and what was expected.
fn bad_configuration(world: &World, text: &str, parts: &[&str]) -> Result<()> {
    let config = written(world, text)?;
    let file = config
        .config
        .as_ref()
        .context("no file")?
        .display()
        .to_string();
    let said = refused(world, &config)?;
    names(&said, &[&file, "expected"])?;
    names(&said, parts)
}

fn unknown_key(world: &World) -> Result<()> {
    bad_configuration(world, "[vm]\nvcpu = 1\n", &["line 2", "vm.vcpu"])
}

fn value_out_of_range(world: &World) -> Result<()> {
    bad_configuration(
        world,
        "\n[vm]\nvcpus = 0\n",
        &["line 3", "vm.vcpus", "1 to 64"],
    )
}

fn value_of_another_type(world: &World) -> Result<()> {
    bad_configuration(
        world,
        "[timeouts]\nboot = [1]\n",
        &["line 2", "timeouts.boot"],
    )
}

fn configuration_not_there(world: &World) -> Result<()> {
    let config = ShimConfig {
        config: Some("/no/such/config.toml".into()),
        ..world.shim()?
    };
    names(&refused(world, &config)?, &["/no/such/config.toml"])
}

fn command_not_found(world: &World) -> Result<()> {
    leaves_nothing(world, || {
        let (shim, bundle) = shim(world, &["/no/such/command"])?;
        let (_, message) = match shim.create(&bundle) {
            Ok(_) => refusal(shim.start_task())?,
            created => refusal(created)?,
        };
        names(&message, &["/no/such/command"])
    })
}

fn agent_never_answers(world: &World) -> Result<()> {
    let silent = initramfs::silent(world)?;
    let keys = [
        ("kernel", "initramfs", silent.as_str()),
        ("timeouts", "boot", "\"5s\""),
    ];
    let config = configured(world, &keys)?;
    leaves_nothing(world, || {
        let id = new_id();
        let bundles = world.files()?.join("bundles");
        let bundle = Bundle::new(&bundles, &id, &world.busybox()?, &["true"])?;
        let shim = Shim::start(&config, &id, &bundle.dir)?;
        let start = Instant::now();
        let (code, message) = refusal(shim.create(&bundle))?;
        equal(code, Code::DEADLINE_EXCEEDED).with_context(|| message.clone())?;
        let took = start.elapsed();
        ensure!(took >= Duration::from_secs(4), "gave up after {took:?}");
        Ok(())
    })
}

/// A VM that is frozen: the deadline passes, it is killed, and its end is told.
fn agent_stops_answering(world: &World) -> Result<()> {
    // Longer than Create takes on a slow and busy machine, where the guest answers yet.
    let config = configured(world, &[("timeouts", "call", "\"8s\"")])?;
    leaves_nothing(world, || {
        let id = new_id();
        let bundles = world.files()?.join("bundles");
        let bundle = Bundle::new(&bundles, &id, &world.busybox()?, &["sleep", "1000"])?;
        let shim = Shim::start(&config, &id, &bundle.dir)?;
        shim.create(&bundle)?;
        let pid = shim.start_task()?;
        freeze(pid)?;
        let (code, message) = refusal(shim.kill(15))?;
        equal(code, Code::DEADLINE_EXCEEDED).with_context(|| message)?;
        // What cannot be killed from inside is killed from outside.
        shim.kill(9)?;
        let exit = Event::Exit { id, status: 137 };
        shim.expect_events(&[Event::Create, Event::Start { pid }, exit])?;
        equal(shim.wait()?.exit_status, 137)?;
        shim.delete().map(drop)
    })
}
