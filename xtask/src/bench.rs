//! `xtask bench`: figures of ours beside runc's and QEMU's, in one run.

use std::io;
use std::time::Duration;

use anyhow::Result;

use crate::arch::Arch;
use crate::containerd::Version;
use crate::host::{self, Place};
use crate::lab::{Gic, Pace};
use crate::programs::{self, Launch};
use crate::step::step;
use crate::{build, kernel, paths};

const LIMIT: Duration = Duration::from_secs(40 * 60);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only the figures counted in instructions (a lab of one processor)
    #[arg(long)]
    icount_only: bool,
    /// Only the figures in wall time
    #[arg(long, conflicts_with = "icount_only")]
    wall_only: bool,
    /// Passed on to the bench program
    #[arg(last = true)]
    args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<u8> {
    build::build(&kernel::ensure(Arch::HOST)?)?;
    let place = host::place();
    host::announce(&place);
    let launch = |icount: bool| {
        let mut all = vec!["--images".to_owned(), "{images}".to_owned()];
        all.extend(icount.then(|| "--icount".to_owned()));
        all.extend(args.args.iter().cloned());
        let name = if icount {
            "bench (instructions)"
        } else {
            "bench (wall time)"
        };
        // Instructions are counted by the lab only, whatever this host can do.
        let place = if icount {
            &Place::Lab(String::new())
        } else {
            &place
        };
        step(name, || {
            let launch = Launch {
                arch: Arch::HOST,
                program: "bench",
                containerd: Version::Newest,
                args: &all,
                timeout: Some(LIMIT),
                silence: None,
                out: Some(paths::products(Arch::HOST).join("bench")),
                gic: Gic::default(),
                pace: if icount {
                    Pace::Counted
                } else {
                    Pace::Parallel
                },
            };
            programs::launch(place, launch, &mut io::stdout())
        })
    };
    let wall = if args.icount_only { 0 } else { launch(false)? };
    let instructions = if args.wall_only { 0 } else { launch(true)? };
    Ok(wall.max(instructions))
}
