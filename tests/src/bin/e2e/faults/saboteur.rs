//! A guest with a saboteur in it: a script that starts before the agent, outside of any container,
//! and ends the guest when it is told to, by a file of /proc that all share.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use supermachine_tests::shim::ShimConfig;

use crate::bad::{configuration, configured};
use crate::initramfs::{Archive, busybox};
use crate::support::World;

const DEFAULT_INITRAMFS: &str = "/usr/local/share/supermachine/initramfs.cpio";

/// What happens to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its kernel panics.
    Panic,
    /// Its agent dies.
    Die,
    /// Its agent runs in circles, and the machine with it.
    Hang,
}

/// When it happens without being told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// When a container asks for it.
    Told,
    /// In the agent's stead.
    Boot,
    /// While the agent makes the container.
    Create,
    /// While the agent starts its program.
    Start,
    /// While the agent makes a process in it, once a container has asked for it.
    Exec,
}

impl Fate {
    fn name(self) -> &'static str {
        match self {
            Self::Panic => "panic",
            Self::Die => "die",
            Self::Hang => "hang",
        }
    }

    /// A command that a container runs to have it happen.
    pub(super) fn command(self) -> String {
        format!("echo {} > /proc/sys/kernel/core_pattern", self.name())
    }
}

/// A command that a container runs to have what its guest's saboteur is for happen in three seconds.
pub(super) const LATER: &str = "echo later > /proc/sys/kernel/core_pattern";

/// A command that a container runs to have the next process in it be the one of [`When::Exec`].
pub(super) const NEXT: &str = "f=/proc/sys/kernel/core_pattern; echo next > $f; \
                               until [ \"$(cat $f)\" = armed ]; do sleep 0.1; done";

/// Stays beside the agent, which it becomes. A container's writes to core_pattern are seen by all.
/// The agent is ended by what is written over its code: breakpoints, or nothing and a loop at its
/// end. An ordinary signal does nothing to the first process.
const SCRIPT: &str = r#"#!/busybox sh
b=/busybox
$b mkdir -p /dev /proc
$b mount -t proc proc /proc
$b mknod /zero c 1 5
# What the shell has as input of what runs beside it.
$b mknod /dev/null c 1 3

panic() {
    echo 1 > /proc/sys/vm/panic_on_oom
    $b tail /zero
}

# Of the agent's code, in pages: where it starts and ends.
code() {
    set -- $($b grep -m 1 ' r-xp ' /proc/1/maps)
    start=$((0x${1%-*} / 4096))
    end=$((0x${1#*-} / 4096))
}

fill() {
    $b tr '\000' "$1" < /zero |
        $b dd of=/proc/1/mem bs=4096 seek=$start count=$(($2 - start)) iflag=fullblock conv=notrunc
}

die() {
    code
    fill '\314' $end
    # Its next signal, of an orphan's end, is its last.
    ( $b true & )
}

hang() {
    code
    last=$((end - 1))
    { $b tr '\000' '\220' < /zero | $b head -c 4094; $b printf '\353\376'; } > /last
    $b dd if=/last of=/proc/1/mem bs=4096 seek=$last conv=notrunc
    fill '\220' $last
    ( $b true & )
}

own=$fate
told() {
    read -r fate < /proc/sys/kernel/core_pattern
}

wait_for() {
    while :; do
        told
        case "$fate" in
        panic|die|hang) return ;;
        later) fate=$own; $b sleep 3; return ;;
        esac
        $b usleep 20000
    done
}

# The agent's helpers, and what they make until it runs its program.
makers() {
    $b pidof supermachine-container
}

# What waits here runs before others, and lets them have a millisecond between two looks, so that
# nothing of theirs is over before it is seen.
be_quick() {
    read -r self _ < /proc/self/stat
    $b renice -n -20 -p $self
}

# The agent waits for a helper that is held.
hold_helper() {
    be_quick
    until set -- $(makers) && [ $# -gt 0 ]; do $b usleep 1000; done
    $b kill -STOP "$@"
}

# A container's process, once its helper has gone, waits for the agent to have its program run.
hold_program() {
    be_quick
    until set -- $(makers) && [ $# = 1 ] &&
        [ "$1" = "$($b cat /proc/1/root/sys/fs/cgroup/containers/*/cgroup.procs)" ]
    do $b usleep 1000; done
    $b kill -STOP "$1"
}

case "$at $fate" in
"boot panic") panic ;;
"boot die") exit 1 ;;
create*) { hold_helper; $own; } & ;;
# The host is told that the container is there, and asks for its start.
start*) { hold_program; $b sleep 3; $own; } & ;;
exec*)
    {
        until told; [ "$fate" = next ]; do $b usleep 20000; done
        while makers; do :; done
        echo armed > /proc/sys/kernel/core_pattern
        hold_helper
        $own
    } &
    ;;
*) { wait_for; $fate; } & ;;
esac
exec /init
"#;

/// A configuration whose guests have one.
pub(super) fn configured_with(
    world: &World,
    when: When,
    fate: Fate,
    more: &[(&str, &str, &str)],
) -> Result<ShimConfig> {
    let installed = configuration()?
        .get("kernel")
        .and_then(|kernel| kernel.get("initramfs"))
        .and_then(|path| path.as_str())
        .map_or_else(|| PathBuf::from(DEFAULT_INITRAMFS), PathBuf::from);
    let agent = fs::read(&installed)
        .with_context(|| format!("read the initramfs {}", installed.display()))?;
    let initramfs = Archive::after(agent)
        .program("busybox", &busybox(world)?)?
        .program("saboteur", SCRIPT.as_bytes())?
        .write(world)?;
    let at = match when {
        When::Told => "told",
        When::Boot => "boot",
        When::Create => "create",
        When::Start => "start",
        When::Exec => "exec",
    };
    // Words that the kernel doesn't know become the environment of its first process.
    let words = format!("\"rdinit=/saboteur at={at} fate={}\"", fate.name());
    let mut keys = vec![
        ("kernel", "initramfs", initramfs.as_str()),
        ("kernel", "cmdline", words.as_str()),
        // Memory that runs out soon.
        ("vm", "memory", "\"128MiB\""),
    ];
    keys.extend(more);
    configured(world, &keys)
}
