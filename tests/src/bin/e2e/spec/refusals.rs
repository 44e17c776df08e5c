//! What a user is told when something can't be run: runc's words and exit codes.

use anyhow::{Result, ensure};
use supermachine_tests::host::{Detached, Host, unique};
use supermachine_tests::program::Finished;
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
        "exec in what has stopped",
        "runc's shim of containerd 1.7 gives no code",
    ),
    (
        "resume of what is not paused",
        "runc's shim of containerd 1.7 gives no code",
    ),
    (
        "pause of what has stopped",
        "runc's shim of containerd 1.7 gives no code",
    ),
    (
        "a mount of no known type",
        "the mount and its type are named, not runc's descriptors",
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

/// The text without the moment, the runtime's name and names of a moment's folders.
fn words(text: &str) -> String {
    let kept = |word: &&str| !word.starts_with("time=\"") && !word.contains("/containerd-mount");
    let words: Vec<&str> = text.split(' ').filter(kept).collect();
    words.join(" ").replace("runc create failed: ", "")
}

/// A mistake, and what was told of it.
type Named = (&'static str, Told);

fn told(finished: Finished) -> Result<Told> {
    Ok((finished.code()?, finished.errors()))
}

fn all(host: &Host) -> Result<Vec<Named>> {
    let mut all = of_runs(host)?;
    let id = unique("twin");
    let container = host
        .container(BUSYBOX)
        .named(&id)
        .detach(&["sleep", "1000"])?;
    all.extend(of_execs(&container)?);
    let ctr =
        |name: &'static str, args: &[&str]| -> Result<Named> { Ok((name, told(host.ctr(args)?)?)) };
    let tasks = |name, args: &[&str]| ctr(name, &[&["tasks"], args, &[&id]].concat());
    all.push(ctr(
        "a name that is taken",
        &["run", "--runtime", &host.runtime, BUSYBOX, &id, "true"],
    )?);
    all.push(tasks("delete while it runs", &["delete"])?);
    all.push(tasks("start while it runs", &["start"])?);
    all.push(tasks("resume of what is not paused", &["resume"])?);
    all.push(tasks("a signal that is none", &["kill", "--signal", "99"])?);
    all.push(tasks("no signal's name", &["kill", "--signal", "NOPE"])?);
    all.push(tasks(
        "kill of an exec that is not there",
        &["kill", "--exec-id", "nosuch"],
    )?);
    container.kill("KILL")?;
    supermachine_tests::until("the end", host.deadline, || {
        Ok(host.status(&id)?.is_some_and(|status| status == "STOPPED"))
    })?;
    all.push((
        "exec in what has stopped",
        told(container.exec(&["true"])?)?,
    ));
    all.push(tasks(
        "kill of what has stopped",
        &["kill", "--signal", "TERM"],
    )?);
    all.push(tasks("pause of what has stopped", &["pause"])?);
    all.push(tasks("start of what has stopped", &["start"])?);
    all.push(tasks("delete of what has stopped", &["delete"])?);
    all.push(tasks("kill of what is gone", &["kill"])?);
    all.push(tasks("delete of what is gone", &["delete"])?);
    // The names are of this run alone.
    for (_, told) in &mut all {
        told.1 = told.1.replace(&id, "ID");
    }
    Ok(all)
}

fn of_runs(host: &Host) -> Result<Vec<Named>> {
    let run = |name, options: &[&str], program| -> Result<Named> {
        let finished = host.container(BUSYBOX).with(options).run(&[program])?;
        Ok((name, told(finished)?))
    };
    Ok(vec![
        run("no such command", &[], "no-such-command")?,
        run("not executable", &[], "/etc/passwd")?,
        run("a directory", &[], "/etc")?,
        run("another user may not", &["--user", "1000"], "/root/x")?,
        run("a user who is not there", &["--user", "nosuch"], "true")?,
        run(
            "the working directory is a file",
            &["--cwd", "/etc/passwd"],
            "true",
        )?,
        run(
            "the working directory can't be made",
            &["--read-only", "--cwd", "/no/such/dir"],
            "true",
        )?,
        run(
            "a mount of no known type",
            &["--mount", "type=nosuch,src=x,dst=/x"],
            "true",
        )?,
    ])
}

fn of_execs(container: &Detached) -> Result<Vec<Named>> {
    let exec = |name, options: &[&str], program| -> Result<Named> {
        Ok((
            name,
            told(container.start_exec(options, &[program])?.finish()?)?,
        ))
    };
    let mut all = vec![
        exec("exec: no such command", &[], "no-such-command")?,
        exec("exec: no such file", &[], "/no/such/file")?,
        exec("exec: not executable", &[], "/etc/passwd")?,
        exec("exec: a directory", &[], "/etc")?,
        exec("exec: below a file", &[], "/etc/passwd/x")?,
        exec(
            "exec: no such working directory",
            &["--cwd", "/no/such/dir"],
            "true",
        )?,
        exec(
            "exec: the working directory is a file",
            &["--cwd", "/etc/passwd"],
            "true",
        )?,
        exec("exec: another user may not", &["--user", "1000"], "/root/x")?,
        exec(
            "exec: a user who is not there",
            &["--user", "nosuch"],
            "true",
        )?,
    ];
    let taken = ["--exec-id", "taken"];
    let mut first = container.start_exec(&taken, &["sh", "-c", "echo up; cat"])?;
    first.expect("up")?;
    all.push(exec("exec: a name that is taken", &taken, "true")?);
    first.close_stdin();
    first.finish()?;
    Ok(all)
}
