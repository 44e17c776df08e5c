//! Boots a kernel: `boot --kernel FILE [--initramfs FILE] [--disk FILE]… [--cmdline TEXT]
//! [--vcpus N] [--memory MIB]`. The kernel's log goes to standard output.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;

use supermachine_vmm::{DiskConfig, Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut config = VmConfig::new(File::open("/dev/null")?);
    config.cmdline = format!("console={} panic=-1", VmConfig::SERIAL);
    config.serial = Some(std::io::stdout().as_fd().try_clone_to_owned()?);

    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| format!("{option} needs a value"))?;
        match option.as_str() {
            "--kernel" => config.kernel = VmConfig::open_kernel(Path::new(&value))?,
            "--initramfs" => config.initramfs = Some(File::open(value)?),
            "--cmdline" => config.cmdline = value,
            "--vcpus" => config.vcpus = value.parse()?,
            "--memory" => config.memory = value.parse::<u64>()? << 20,
            "--disk" => config.disks.push(DiskConfig {
                files: vec![File::options().read(true).write(true).open(&value)?],
                read_only: false,
                serial: format!("disk{}", config.disks.len()),
            }),
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let exit = Vm::new(config)?.start()?.wait();
    writeln!(std::io::stderr(), "The VM ended: {exit}")?;
    Ok(())
}
