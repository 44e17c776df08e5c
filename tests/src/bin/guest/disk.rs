//! Disk I/O of each kind for a while, past the page cache, with so many requests at once.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use supermachine_tests::disk::{CASES, Case, MARKER};

const DISK: &str = "/dev/vda";
/// How long each case runs, as the kernel's command line says.
const TIME: &str = "GUEST_MILLISECONDS";
/// A page: what direct I/O wants buffers aligned to.
const ALIGN: usize = 4096;

pub(crate) fn run() -> Result<()> {
    let mut disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(DISK)
        .with_context(|| format!("cannot open {DISK}"))?;
    let size = disk
        .seek(SeekFrom::End(0))
        .context("the disk has no size")?;
    let time = std::env::var(TIME).with_context(|| format!("no {TIME} is given"))?;
    let time = Duration::from_millis(time.parse().context("a time is odd")?);
    for (number, case) in (0_u32..).zip(CASES) {
        // Both VMMs show it in a trace: here a case begins, and here it ends.
        mark(number * 2);
        let (requests, nanoseconds) = measure(&disk, size, case, time)?;
        mark(number * 2 + 1);
        crate::tell(&format!("DISK {number} {requests} {nanoseconds}"));
    }
    Ok(())
}

/// CPUID of a leaf nobody has: it exits to the host on every VMM.
#[cfg(target_arch = "x86_64")]
fn mark(what: u32) {
    core::arch::x86_64::__cpuid_count(MARKER, what);
}

/// Nothing exits like that here.
#[cfg(not(target_arch = "x86_64"))]
fn mark(what: u32) {
    let _ = (MARKER, what);
}

/// `struct iocb` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;

/// How many requests were done, and in how many nanoseconds.
fn measure(disk: &File, size: u64, case: Case, time: Duration) -> Result<(u64, u128)> {
    let depth = case.depth;
    let layout = Layout::from_size_align(case.block * depth, ALIGN).context("no such buffer")?;
    // SAFETY: the layout is not empty. The buffer lives until the machine's end.
    let buffer = unsafe { alloc_zeroed(layout) };
    ensure!(!buffer.is_null(), "no memory for {depth} buffers");
    let mut context: libc::c_ulong = 0;
    // SAFETY: the kernel writes the new context's number.
    let made = unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) };
    ensure!(made == 0, "io_setup: {}", std::io::Error::last_os_error());

    let blocks = size / case.block as u64;
    let mut position = 0_u64;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        if case.random {
            // xorshift64
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % blocks
        } else {
            position += 1;
            position % blocks
        }
    };
    let mut slots = vec![Iocb::default(); depth];
    for (index, slot) in slots.iter_mut().enumerate() {
        *slot = Iocb {
            data: index as u64,
            opcode: if case.write {
                IOCB_CMD_PWRITE
            } else {
                IOCB_CMD_PREAD
            },
            fd: disk.as_raw_fd() as u32,
            buffer: buffer.wrapping_add(index * case.block) as u64,
            bytes: case.block as u64,
            ..Iocb::default()
        };
    }
    let mut submit = |slots: &mut [Iocb], which: &[usize]| -> Result<()> {
        let pointers: Vec<*mut Iocb> = which
            .iter()
            .map(|&index| {
                slots[index].offset = (next() * case.block as u64) as i64;
                &raw mut slots[index]
            })
            .collect();
        // SAFETY: each block describes a part of the buffer that no other request has.
        let taken = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                context,
                pointers.len(),
                pointers.as_ptr(),
            )
        };
        ensure!(
            usize::try_from(taken) == Ok(which.len()),
            "io_submit: {taken}, {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    };

    let begin = Instant::now();
    let mut done = 0;
    let mut idle: Vec<usize> = (0..depth).collect();
    let mut events = vec![Event::default(); depth];
    loop {
        let over = begin.elapsed() >= time;
        if !over {
            submit(&mut slots, &idle)?;
            idle.clear();
        } else if idle.len() == depth {
            break;
        }
        // SAFETY: room for as many events as are asked for.
        let count = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                1_usize,
                depth,
                events.as_mut_ptr(),
                std::ptr::null::<libc::timespec>(),
            )
        };
        let count = usize::try_from(count).ok().context("io_getevents")?;
        for event in &events[..count] {
            if event.result != case.block as i64 {
                bail!(
                    "a request of {} bytes ended with {}",
                    case.block,
                    event.result
                );
            }
            idle.push(event.data as usize);
            done += 1;
        }
    }
    Ok((done, begin.elapsed().as_nanos()))
}
