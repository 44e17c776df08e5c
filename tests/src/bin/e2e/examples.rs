//! The examples of the VMM crate, as its README shows them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use supermachine_tests::initramfs::Initramfs;
use supermachine_tests::program::Program;
use supermachine_tests::work::{State, TICK, TICKS, VSOCK_PORT};

use crate::bad;
use crate::machine::command_line;
use crate::support::World;

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.vm_test("examples::boot", boot),
        world.vm_test("examples::balloon", balloon),
        world.vm_test("examples::snapshot", snapshot),
    ]
}

fn boot(world: &World) -> Result<()> {
    // The guest has nothing to do, says so and resets.
    let said = run(world, "boot", &["--cmdline", &command_line("")])?;
    ensure!(said.contains("guest: GUEST="), "{said}");
    ensure!(said.contains("The VM ended: "), "{said}");
    Ok(())
}

fn balloon(world: &World) -> Result<()> {
    let cmdline = command_line("GUEST=wait");
    let options = ["--cmdline", &cmdline, "--memory", "256", "--take", "100"];
    let said = run(world, "balloon", &options)?;
    ensure!(
        said.contains("inflated: the balloon holds 100 MiB"),
        "{said}"
    );
    ensure!(said.contains("deflated: the balloon holds 0 MiB"), "{said}");
    ensure!(said.contains("the VM ended: "), "{said}");
    Ok(())
}

/// A guest with two vCPUs that works on its disk, console, socket and timer goes on from the middle of
/// that, each time exactly where it was: from a snapshot, and from a diff on it.
fn snapshot(world: &World) -> Result<()> {
    const LINES: usize = 5;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let disk = dir.path().join("original.disk");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    let cmdline = command_line("GUEST=work");
    let options = [
        ["--cmdline", &cmdline],
        ["--vcpus", "2"],
        ["--memory", "128"],
        ["--disk", disk.to_str().context("a path")?],
        ["--dir", dir.path().to_str().context("a path")?],
        ["--lines", &LINES.to_string()],
        ["--ask", &VSOCK_PORT.to_string()],
        ["--clones", "20"],
        ["--at-once", "5"],
    ];
    let said = run(world, "snapshot", options.as_flattened())?;
    let of = |name: &str| Worked::of(name, LINES, &said).with_context(|| said.clone());
    let (original, resumed) = (of("original")?, of("resumed")?);
    let clones = (0..20).map(|n| format!("clone {n}"));
    let beside = (0..5).map(|n| format!("beside {n}"));
    let mut began = [Vec::new(), Vec::new()];
    for name in clones.chain(beside) {
        let of_diff = name.ends_with(['1', '3', '5', '7', '9']);
        began[usize::from(of_diff)].push(of(&name)?.lines[0]);
    }
    // All of them where the original was, or it would have said more.
    for began in &began {
        ensure!(
            began
                .iter()
                .all(|state| state.step == began[0].step && state.hash == began[0].hash),
            "{began:?}"
        );
    }
    let [full, diff] = began.map(|began| began[0].step);
    ensure!(full > original.last().step, "{said}");
    ensure!(diff > resumed.last().step && diff > full, "{said}");
    let size = |name: &str| -> Result<u64> {
        let line = format!("{name} snapshot: ");
        let size = said.lines().find_map(|said| said.strip_prefix(&line));
        let kibibytes = size.and_then(|size| size.strip_suffix(" KiB"));
        Ok(kibibytes.context("no size")?.parse()?)
    };
    ensure!(size("diff")? < size("full")? / 2, "{said}");
    Ok(())
}

/// What a guest has said of its work.
#[derive(Debug)]
struct Worked {
    lines: Vec<State>,
    /// With the microseconds of the host's clock when it was asked, and had answered.
    answers: Vec<(u64, u64, State)>,
}

impl Worked {
    /// Takes it from what the example said, and checks that all of the guest went on.
    fn of(name: &str, count: usize, said: &str) -> Result<Self> {
        let (line, answer) = (format!("{name}: "), format!("{name} from "));
        let lines = said.lines().filter_map(|said| said.strip_prefix(&line));
        let lines: Vec<State> = lines.map(str::parse).collect::<Result<_>>()?;
        let answers = said.lines().filter_map(|said| said.strip_prefix(&answer));
        let answers = answers
            .map(|answer| {
                let (times, state) = answer.split_once(": ").context("no answer")?;
                let (asked, answered) = times.split_once(" to ").context("no times")?;
                Ok((asked.parse()?, answered.parse()?, state.parse()?))
            })
            .collect::<Result<_>>()?;
        let worked = Self { lines, answers };
        worked.check(count).with_context(|| name.to_owned())?;
        Ok(worked)
    }

    fn last(&self) -> &State {
        &self.lines[self.lines.len() - 1]
    }

    fn check(&self, count: usize) -> Result<()> {
        let Self { lines, answers } = self;
        let [first, _, last] = answers[..] else {
            bail!("{} answers", answers.len());
        };
        ensure!(lines.len() == count, "{} lines", lines.len());
        for pair in lines.windows(2) {
            ensure!(pair[1].step == pair[0].step + 1, "{pair:?}");
            ensure!(pair[1].ticks >= pair[0].ticks, "{pair:?}");
        }
        let answered = answers.iter().map(|(.., state)| state);
        let all: Vec<_> = lines.iter().chain(answered).collect();
        for state in &all {
            state.check()?;
        }
        // It worked on meanwhile; its clock ran and its timer went off.
        for pair in all.windows(2) {
            ensure!(pair[1].step >= pair[0].step, "{pair:?}");
            ensure!(pair[1].clock > pair[0].clock, "{pair:?}");
        }
        let mut before = self.last();
        for (.., state) in answers {
            ensure!(state.ticks >= before.ticks + TICKS, "{before:?}, {state:?}");
            before = state;
        }
        // As fast as the host's: between two answers lies what was before and after both, on it, and
        // no more than that.
        let guest = last.2.clock - first.2.clock;
        let (least, most) = (last.0 - first.1, last.1 - first.0);
        let off = 1000 + most / 50;
        ensure!(
            guest + off >= least && guest <= most + off,
            "{guest} us of the guest's are {least} to {most} of the host's"
        );
        // A timer that is early would be as wrong.
        let ticks = last.2.ticks - first.2.ticks;
        let shortest = ticks.saturating_sub(1) * TICK.as_micros() as u64;
        ensure!(guest >= shortest, "{ticks} ticks in {guest} us");
        Ok(())
    }
}

/// Runs an example on the installed kernel and the guest program; all it said.
fn run(world: &World, example: &str, options: &[&str]) -> Result<String> {
    let ours = std::env::current_exe().context("find this program")?;
    let archive: PathBuf = world.files()?.join("example.cpio");
    let init = Initramfs::of_program(&ours.with_file_name("guest"))?;
    std::fs::write(&archive, init.finish()).context("write an initramfs")?;
    let mut command = Command::new(ours.with_file_name(format!("example-{example}")));
    command
        .arg("--kernel")
        .arg(bad::kernel()?)
        .arg("--initramfs")
        .arg(&archive)
        .args(options);
    // The longest has 26 VMs, most of them one after the other.
    let finished = Program::run(command, 3 * world.host.deadline)?;
    let said = format!("{}{}", finished.text(), finished.errors());
    finished.success().with_context(|| said.clone())?;
    Ok(said)
}
