//! Takes memory from a guest and gives it back:
//! `balloon --kernel FILE --initramfs FILE [--cmdline TEXT] [--memory MIB] [--take MIB]`.
//! The guest needs nothing but the driver of virtio-balloon. Its log goes to standard error.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use supermachine_vmm::devices::virtio::balloon::{BalloonConfig, Handle};
use supermachine_vmm::{Vm, VmConfig};

/// How long a guest may take to boot, and to follow.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let mut config = VmConfig::new(File::open("/dev/null")?);
    config.cmdline = format!("console={} quiet panic=-1", VmConfig::SERIAL);
    config.serial = Some(std::io::stderr().as_fd().try_clone_to_owned()?);
    config.balloon = Some(BalloonConfig {
        // At least so much stays with the guest, whatever it is asked for.
        floor: 64 << 20,
        ..BalloonConfig::default()
    });
    let mut take = 64;

    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| format!("{option} needs a value"))?;
        match option.as_str() {
            "--kernel" => config.kernel = VmConfig::open_kernel(Path::new(&value))?,
            "--initramfs" => config.initramfs = Some(File::open(value)?),
            "--cmdline" => config.cmdline = value,
            "--memory" => config.memory = value.parse::<u64>()? << 20,
            "--take" => take = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }

    let running = Vm::new(config)?.start()?;
    let balloon = running.balloon().ok_or("the VM has no balloon")?;
    // Nobody need wait for the driver: it finds its target when it starts.
    balloon.set_target(take << 20)?;
    balloon.wait_for_target(PATIENCE)?;
    tell("inflated", &balloon)?;
    balloon.set_target(0)?;
    balloon.wait_for_target(PATIENCE)?;
    tell("deflated", &balloon)?;
    running.stop();
    writeln!(std::io::stdout(), "the VM ended: {}", running.wait())?;
    Ok(())
}

fn tell(what: &str, balloon: &Handle) -> Result<(), Box<dyn Error>> {
    let report = balloon.report(Duration::from_secs(5))?;
    let mebibytes = |bytes: u64| bytes >> 20;
    writeln!(
        std::io::stdout(),
        "{what}: the balloon holds {} MiB, the guest has {} MiB free, {} MiB went back to the host",
        mebibytes(report.actual),
        report.stats.free.map_or(0, mebibytes),
        mebibytes(balloon.metrics().discarded_bytes.get()),
    )?;
    Ok(())
}
