//! What the process is denied, tried out as if it were an intruder: this program, executed again, goes
//! the same way into its jail, and then does what only that would.
//!
//! Each attempt is made three times: outside of any jail, where it must work or the attempt itself
//! is wrong; behind the walls alone; and under the filter of system calls.

use std::ffi::c_long;
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, openat};
use supermachine_runtime::changes::confine;
use supermachine_vmm::jail::{self, Layer, Policy, Seccomp};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("denied::nothing_without_a_jail", nothing_without_a_jail),
    ("denied::by_the_walls", by_the_walls),
    ("denied::by_the_filter", by_the_filter),
    ("denied::but_not_its_own_work", not_its_own_work),
];

const PROBE: &str = "--probe";
/// Exit status of an attempt that was no error.
const WORKED: i32 = 0;
/// Of one that was a denial of a wall this host lacks.
const LACKING: u8 = 200;

struct Attempt {
    name: &'static str,
    /// The system call that the filter ends it for; none if its own work takes it too.
    call: Option<c_long>,
    /// Whether it works outside of any jail.
    free: bool,
    /// Whether it fails behind the walls.
    walled: bool,
    /// Given the snapshot's directory.
    run: fn(&File) -> io::Result<()>,
}

const ATTEMPTS: &[Attempt] = &[
    Attempt {
        name: "open /etc/passwd",
        call: None,
        free: true,
        walled: true,
        run: |_| File::open("/etc/passwd").map(drop),
    },
    Attempt {
        name: "list the root",
        call: None,
        free: true,
        walled: true,
        run: |_| File::open("/").map(drop),
    },
    Attempt {
        name: "list what is above the snapshot",
        call: None,
        free: true,
        walled: true,
        run: |snapshot| {
            openat(snapshot, "..", OFlags::RDONLY, Mode::empty())
                .map(drop)
                .map_err(Into::into)
        },
    },
    Attempt {
        name: "execute a program",
        call: Some(libc::SYS_execve),
        free: true,
        walled: true,
        run: |_| {
            let program = c"/bin/true";
            nix::unistd::execv(program, &[program])
                .map(drop)
                .map_err(Into::into)
        },
    },
    Attempt {
        name: "connect by TCP",
        call: Some(libc::SYS_socket),
        free: true,
        walled: true,
        run: |_| {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            TcpStream::connect(listener.local_addr()?).map(drop)
        },
    },
    Attempt {
        name: "make sockets",
        call: Some(libc::SYS_socketpair),
        free: true,
        walled: false,
        run: |_| UnixStream::pair().map(drop),
    },
    Attempt {
        name: "signal the host's init",
        call: Some(libc::SYS_kill),
        free: true,
        walled: false,
        run: |_| {
            let init = nix::unistd::Pid::from_raw(1);
            nix::sys::signal::kill(init, None).map_err(Into::into)
        },
    },
    Attempt {
        name: "become root",
        call: Some(libc::SYS_setuid),
        free: true,
        walled: true,
        run: |_| nix::unistd::setuid(nix::unistd::Uid::from_raw(0)).map_err(Into::into),
    },
    Attempt {
        name: "change the root",
        call: Some(libc::SYS_chroot),
        free: true,
        walled: true,
        run: |_| nix::unistd::chroot(".").map_err(Into::into),
    },
    Attempt {
        name: "mount",
        call: Some(libc::SYS_mount),
        free: false,
        walled: false,
        run: |_| {
            let flags = nix::mount::MsFlags::empty();
            let none = None::<&str>;
            nix::mount::mount(none, "/nowhere", none, flags, none).map_err(Into::into)
        },
    },
    Attempt {
        name: "enter a new user namespace",
        call: Some(libc::SYS_unshare),
        free: true,
        walled: false,
        run: |_| unshare(CloneFlags::CLONE_NEWUSER).map_err(Into::into),
    },
    Attempt {
        name: "make a file in memory",
        call: Some(libc::SYS_memfd_create),
        free: true,
        walled: false,
        run: |_| {
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::empty())
                .map(drop)
                .map_err(Into::into)
        },
    },
];

/// Plays the intruder: `--probe JAIL DIRECTORY ATTEMPT`. Its status is the error number it met.
pub(crate) fn child() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next()? != PROBE {
        return None;
    }
    let (jail, directory, place) = (arguments.next()?, arguments.next()?, arguments.next()?);
    let open = |name: &str| File::open(Path::new(&directory).join(name)).unwrap();
    let (snapshot, staging) = (open("snapshot"), open("staging"));
    if jail != "none" {
        let policy = Policy {
            seccomp: match jail.as_str() {
                "filter" => Seccomp::Enforce,
                _ => Seccomp::Off,
            },
            ..Policy::default()
        };
        let missing = confine(&policy, [snapshot.as_fd(), staging.as_fd()]).unwrap();
        // Above the snapshot only Landlock is in the way: the directory is of the host's tree.
        if missing
            .iter()
            .any(|missing| missing.layer == Layer::Landlock)
            && place == "2"
        {
            return Some(ExitCode::from(LACKING));
        }
    }
    let result = match place.parse::<usize>() {
        Ok(place) => (ATTEMPTS[place].run)(&snapshot),
        Err(_) => work(&snapshot),
    };
    Some(ExitCode::from(match result {
        Ok(()) => 0,
        Err(error) => u8::try_from(error.raw_os_error().unwrap_or(255)).unwrap_or(255),
    }))
}

/// What it is for.
fn work(snapshot: &File) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE;
    let file = openat(snapshot, "made", flags, Mode::RWXU)?;
    rustix::fs::fchown(&file, Some(rustix::fs::Uid::from_raw(7)), None)?;
    Ok(rustix::fs::mkdirat(snapshot, "directory", Mode::RWXU)?)
}

fn intrude(jail: &str, place: &str) -> Output {
    let directory = tempfile::tempdir().unwrap();
    for name in ["snapshot", "staging"] {
        std::fs::create_dir(directory.path().join(name)).unwrap();
    }
    let mut command = Command::new("/proc/self/exe");
    command
        .args([PROBE, jail])
        .arg(directory.path())
        .arg(place)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // As the process itself is started.
    jail::spawn_apart(&mut command)
        .unwrap()
        .wait_with_output()
        .unwrap()
}

fn nothing_without_a_jail() {
    for (place, attempt) in ATTEMPTS.iter().enumerate() {
        if attempt.free {
            let output = intrude("none", &place.to_string());
            assert!(output.status.success(), "{}: {output:?}", attempt.name);
        }
    }
}

fn by_the_walls() {
    for (place, attempt) in ATTEMPTS.iter().enumerate() {
        if attempt.walled {
            let output = intrude("walls", &place.to_string());
            let denied = output.status.code().is_some_and(|code| code != WORKED);
            // Said by a panic, if it didn't come as far as the attempt.
            assert!(
                denied && output.stderr.is_empty(),
                "{}: {output:?}",
                attempt.name
            );
        }
    }
}

fn by_the_filter() {
    for (place, attempt) in ATTEMPTS.iter().enumerate() {
        let Some(call) = attempt.call else { continue };
        let output = intrude("filter", &place.to_string());
        let expected = format!("{}{call} changes\n", jail::SECCOMP_REPORT);
        assert_eq!(
            (
                output.status.code(),
                String::from_utf8_lossy(&output.stderr).as_ref()
            ),
            (Some(jail::SECCOMP_EXIT_STATUS), expected.as_str()),
            "{}",
            attempt.name
        );
    }
}

fn not_its_own_work() {
    for jail in ["none", "walls", "filter"] {
        let output = intrude(jail, "work");
        assert!(output.status.success(), "{jail}: {output:?}");
    }
}
