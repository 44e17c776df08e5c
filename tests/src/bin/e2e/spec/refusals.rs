//! What a user is told when something can't be run: runc's words and exit codes.

use anyhow::{Result, ensure};
use supermachine_tests::host::{Detached, Host, unique};
use supermachine_tests::{BUSYBOX, RUNC};

use crate::support::World;

/// Texts that differ on purpose, and why.
const CLEARER: &[(&str, &str)] = &[
    ("the working directory is a file", "the key is named"),
    (
        "a signal that is none",
        "the number is named, and what was expected",
    ),
    (
        "kill of what has stopped",
        "the code alone says \"not found\"",
    ),
    (
        "exec in what has stopped",
        "runc's shim of containerd 1.7 gives no code",
    ),
];

/// What `ctr` said and how it ended.
type Told = (i32, String);

pub(super) fn texts(world: &World) -> Result<()> {
    let reference = Host {
        runtime: RUNC.to_owned(),
        ..world.host.clone()
    };
    let (ours, theirs) = (all(&world.host)?, all(&reference)?);
    let mut differences = Vec::new();
    for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        let clearer = CLEARER.iter().any(|(clearer, _)| clearer == name);
        if ours.0 != theirs.0 || !clearer && words(&ours.1) != words(&theirs.1) {
            differences.push(format!("{name}:\n  ours: {ours:?}\n  runc: {theirs:?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// The text without the moment and the runtime's name.
fn words(text: &str) -> String {
    let words = text.split(' ').filter(|word| !word.starts_with("time=\""));
    let words: Vec<&str> = words.collect();
    words.join(" ").replace("runc create failed: ", "")
}

fn all(host: &Host) -> Result<Vec<(&'static str, Told)>> {
    let mut all = Vec::new();
    let told = |finished: supermachine_tests::program::Finished| -> Result<Told> {
        Ok((finished.code()?, finished.errors()))
    };
    let run = |options: &[&str], program: &[&str]| {
        told(host.container(BUSYBOX).with(options).run(program)?)
    };
    all.push(("no such command", run(&[], &["no-such-command"])?));
    all.push((
        "the working directory is a file",
        run(&["--cwd", "/etc/passwd"], &["true"])?,
    ));

    let id = unique("twin");
    let container = host
        .container(BUSYBOX)
        .named(&id)
        .detach(&["sleep", "1000"])?;
    let exec = |container: &Detached, options: &[&str], program: &[&str]| {
        told(container.start_exec(options, program)?.finish()?)
    };
    for (name, options, program) in [
        ("exec: no such command", &[][..], "no-such-command"),
        ("exec: no such file", &[], "/no/such/file"),
        ("exec: not executable", &[], "/etc/passwd"),
        ("exec: a directory", &[], "/etc"),
        ("exec: below a file", &[], "/etc/passwd/x"),
        (
            "exec: no such working directory",
            &["--cwd", "/no/such/dir"],
            "true",
        ),
        (
            "exec: the working directory is a file",
            &["--cwd", "/etc/passwd"],
            "true",
        ),
        ("exec: another user may not", &["--user", "1000"], "/root/x"),
    ] {
        all.push((name, exec(&container, options, &[program])?));
    }
    let ctr = |args: &[&str]| told(host.ctr(args)?);
    all.push((
        "a name that is taken",
        ctr(&["run", "--runtime", &host.runtime, BUSYBOX, &id, "true"])?,
    ));
    all.push(("delete while it runs", ctr(&["tasks", "delete", &id])?));
    all.push((
        "a signal that is none",
        ctr(&["tasks", "kill", "--signal", "99", &id])?,
    ));
    container.kill("KILL")?;
    supermachine_tests::until("the end", host.deadline, || {
        Ok(host.status(&id)?.is_some_and(|status| status == "STOPPED"))
    })?;
    all.push((
        "exec in what has stopped",
        exec(&container, &[], &["true"])?,
    ));
    all.push((
        "kill of what has stopped",
        ctr(&["tasks", "kill", "--signal", "TERM", &id])?,
    ));
    all.push(("start of what has stopped", ctr(&["tasks", "start", &id])?));
    all.push((
        "delete of what has stopped",
        ctr(&["tasks", "delete", &id])?,
    ));
    all.push(("kill of what is gone", ctr(&["tasks", "kill", &id])?));
    // The ids of execs are of this run alone.
    for (_, told) in &mut all {
        told.1 = told.1.replace(&id, "ID");
    }
    Ok(all)
}
