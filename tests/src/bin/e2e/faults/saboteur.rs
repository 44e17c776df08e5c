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
wait_for() {
    while :; do
        read -r fate < /proc/sys/kernel/core_pattern
        case "$fate" in
        panic|die|hang) return ;;
        later) fate=$own; $b sleep 3; return ;;
        esac
        $b usleep 20000
    done
}

case "$at $fate" in
"boot panic") panic ;;
"boot die") exit 1 ;;
esac
{ wait_for; $fate; } &
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
