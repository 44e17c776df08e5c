//! System calls by name, for the tables of what each kind of thread may do.
//!
//! A call that a processor's Linux never had, and every call where there is no seccomp, is
//! [`NONE`]: a rule about it says nothing.

#![allow(non_upper_case_globals, reason = "the names of libc")]

/// No call.
pub const NONE: libc::c_long = -1;

/// Names every call once: as Linux numbers it, or not at all elsewhere.
macro_rules! calls {
    ($($call:ident)*) => {
        #[cfg(target_os = "linux")]
        pub use libc::{$($call),*};

        $(
            #[cfg(not(target_os = "linux"))]
            #[doc = concat!("`", stringify!($call), "`")]
            pub const $call: libc::c_long = NONE;
        )*
    };
}

/// Those that newer processors' Linux has only in a later form.
macro_rules! old_calls {
    ($($call:ident)*) => {
        $(
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            pub use libc::$call;

            #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
            #[doc = concat!("`", stringify!($call), "`")]
            pub const $call: libc::c_long = NONE;
        )*
    };
}

calls! {
    SYS_accept4
    SYS_brk
    SYS_clock_gettime
    SYS_clone
    SYS_clone3
    SYS_close
    SYS_dup
    SYS_epoll_create1
    SYS_epoll_ctl
    SYS_epoll_pwait
    SYS_epoll_pwait2
    SYS_eventfd2
    SYS_exit
    SYS_exit_group
    SYS_fallocate
    SYS_fcntl
    SYS_fdatasync
    SYS_fstat
    SYS_fsync
    SYS_ftruncate
    SYS_futex
    SYS_getpeername
    SYS_getpid
    SYS_getrandom
    SYS_getsockopt
    SYS_gettid
    SYS_gettimeofday
    SYS_io_uring_enter
    SYS_io_uring_register
    SYS_ioctl
    SYS_lseek
    SYS_madvise
    SYS_mmap
    SYS_mprotect
    SYS_mremap
    SYS_munmap
    SYS_newfstatat
    SYS_ppoll
    SYS_prctl
    SYS_pread64
    SYS_preadv
    SYS_pwrite64
    SYS_pwritev
    SYS_read
    SYS_readv
    SYS_recvfrom
    SYS_recvmsg
    SYS_restart_syscall
    SYS_rseq
    SYS_rt_sigaction
    SYS_rt_sigprocmask
    SYS_rt_sigreturn
    SYS_sched_getaffinity
    SYS_sched_yield
    SYS_seccomp
    SYS_sendmsg
    SYS_sendto
    SYS_set_robust_list
    SYS_shutdown
    SYS_sigaltstack
    SYS_statx
    SYS_tgkill
    SYS_timerfd_create
    SYS_timerfd_settime
    SYS_write
    SYS_writev
}

old_calls! {
    SYS_epoll_wait
    SYS_poll
}
