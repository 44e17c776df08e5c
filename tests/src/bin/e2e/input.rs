//! What a container reads.

use anyhow::Result;
use libtest_mimic::Trial;
use supermachine_tests::{BUSYBOX, sha256};

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("input::then_end_of_file", then_end_of_file),
        world.test("input::line_by_line", line_by_line),
        world.test("input::one_megabyte", one_megabyte),
        world.test("input::left_unread", left_unread),
    ]
}

// Each container says when it is there: an end of file that comes before the task does is never
// passed on by ctr.

fn then_end_of_file(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX);
    let mut running = container.start(&["sh", "-c", "echo ready; cat; echo end"])?;
    let program = running.program()?;
    program.expect("ready\n")?;
    program.write(b"some input\n")?;
    program.close_stdin();
    let finished = running.finish()?;
    equal(finished.text().as_str(), "ready\nsome input\nend\n")?;
    equal(finished.code()?, 0)
}

fn line_by_line(world: &World) -> Result<()> {
    let script = "echo ready; while read line; do echo \"got $line\"; done";
    let mut running = world.host.container(BUSYBOX).start(&["sh", "-c", script])?;
    let program = running.program()?;
    program.expect("ready\n")?;
    for word in ["one", "two", "three"] {
        program.write(format!("{word}\n").as_bytes())?;
        program.expect(&format!("got {word}\n"))?;
    }
    program.close_stdin();
    equal(running.finish()?.code()?, 0)
}

fn one_megabyte(world: &World) -> Result<()> {
    let data: Vec<u8> = (0..1 << 20)
        .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut running =
        world
            .host
            .container(BUSYBOX)
            .start(&["sh", "-c", "echo ready; sha256sum"])?;
    let program = running.program()?;
    program.expect("ready\n")?;
    program.write(&data)?;
    program.close_stdin();
    let text = running.finish()?.text();
    let sum = text
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().next());
    equal(sum, Some(sha256(&data).as_str()))
}

/// A container that doesn't read its input ends all the same.
fn left_unread(world: &World) -> Result<()> {
    let script = "echo ready; read line; exit 3";
    let mut running = world.host.container(BUSYBOX).start(&["sh", "-c", script])?;
    let program = running.program()?;
    program.expect("ready\n")?;
    program.write(b"one line\nand what nobody reads\n")?;
    equal(running.finish()?.code()?, 3)
}
