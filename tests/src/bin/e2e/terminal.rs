//! Containers with a terminal.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use supermachine_tests::BUSYBOX;
use supermachine_tests::terminal::Terminal;

use crate::support::{World, equal};

pub(crate) fn tests(world: &World) -> Vec<Trial> {
    vec![
        world.test("terminal::size_and_resize", size_and_resize),
        world.test("terminal::typing", typing),
        world.test("terminal::of_an_exec", of_an_exec),
    ]
}

/// Waits in the container until the terminal has a size: ctr sets it when the task runs already.
const AWAIT_SIZE: &str = "await() { until [ \"$(stty size)\" = \"$1\" ]; do sleep 0.1; done; }; ";

fn size_and_resize(world: &World) -> Result<()> {
    let script = format!(
        "{AWAIT_SIZE} test -t 0 && test -t 1 && test -t 2 && echo tty; \
         await '40 100'; echo first; await '50 132'; echo second; exit 5"
    );
    let container = world.host.container(BUSYBOX);
    let (mut terminal, _guard) = container.start_in_terminal(100, 40, &["sh", "-c", &script])?;
    terminal.expect("tty\n")?;
    terminal.expect("first\n")?;
    terminal.resize_until(132, 50, "second\n")?;
    equal(terminal.finish()?.code(), Some(5))
}

fn typing(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX);
    let (mut terminal, _guard) = container.start_in_terminal(80, 25, &["sh"])?;
    terminal.expect("# ")?;
    terminal.type_in("echo $((6 * 7)) answers\r")?;
    terminal.expect("42 answers")?;
    // The line discipline is the guest's: ^C interrupts what runs there.
    // What is typed is shown too, so the quotes: without them the shell has run it. It is said by
    // what is to be interrupted, which then has the terminal already.
    terminal.type_in("sh -c 'echo sleep\"\"ing; exec sleep 1000'; echo sl''ept\r")?;
    terminal.expect("sleeping\n")?;
    terminal.type_in("\u{3}")?;
    let shown = terminal.expect("# ")?;
    ensure!(!shown.contains("slept"), "sleep ended by itself: {shown:?}");
    terminal.type_in("exit 9\r")?;
    equal(terminal.finish()?.code(), Some(9))
}

fn of_an_exec(world: &World) -> Result<()> {
    let container = world.host.container(BUSYBOX).detach(&["sleep", "1000"])?;
    let script = format!("{AWAIT_SIZE} tty; await '30 90'; echo sized");
    let command = container.exec_command(&["--tty"], &["sh", "-c", &script]);
    let mut terminal = Terminal::start(&command, 90, 30, world.host.deadline)?;
    terminal.expect("/dev/pts/")?;
    terminal.expect("sized\n")?;
    equal(terminal.finish()?.code(), Some(0))
}
