//! `xtask demo`: from a fresh machine to containers in microVMs.

use std::io;
use std::time::Duration;

use anyhow::Result;

use crate::arch::Arch;
use crate::containerd::Version;
use crate::host::{self, Place};
use crate::programs::{self, Launch};
use crate::step::step;
use crate::{build, images, lab};

const LIMIT: Duration = Duration::from_secs(5 * 60);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// With the stock Debian kernel even if the lean one is cached
    #[arg(long)]
    stock: bool,
}

pub(crate) fn run(args: &Args) -> Result<u8> {
    let place = host::place();
    host::announce(&place);
    // Compiling keeps the processors busy, packages the network and the disk: at the same time.
    std::thread::scope(|scope| -> Result<()> {
        let prepared = scope.spawn(|| prepare(&place));
        let kernel = if args.stock {
            crate::kernel::stock::ensure(Arch::HOST)?
        } else {
            build::best_kernel(Arch::HOST)?
        };
        eprintln!(
            "    guest kernel: {} (`make kernel` builds the lean one)",
            kernel.name()
        );
        build::build(&kernel)?;
        prepared
            .join()
            .unwrap_or_else(|_| anyhow::bail!("preparing panicked"))
    })?;
    let mut args = vec!["--images".to_owned(), "{images}".to_owned()];
    if matches!(place, Place::Lab(_)) {
        // The lab's own containerd holds the images already; it ends with the lab.
        args.push(format!("--containerd-address={}", lab::CONTAINERD));
    }
    let launch = Launch {
        arch: Arch::HOST,
        program: "demo",
        containerd: Version::Newest,
        args: &args,
        timeout: Some(LIMIT),
        silence: None,
        out: None,
        pace: lab::Pace::Steady,
        gic: lab::Gic::default(),
    };
    step("containers in microVMs", || {
        programs::launch(&place, launch, &mut io::stdout())
    })
}

fn prepare(place: &Place) -> Result<()> {
    images::ensure(Arch::HOST)?;
    match place {
        Place::Native => crate::containerd::binaries(Version::Newest, Arch::HOST).map(drop),
        Place::Lab(_) => lab::prepare(Arch::HOST),
    }
}
