//! The daemon: serves one container's Task API until containerd says it is done, or has forgotten it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};
use supermachine_runtime::config::{self, Level, Resolved};
use supermachine_runtime::sandbox::Sandbox;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::level_filters::LevelFilter;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::BoxError;
use crate::args::Args;
use crate::publish::Publisher;
use crate::start::socket_of;
use crate::task::{Task, services};

/// Blocking work (images, control of the VM) is short and seldom parallel.
const BLOCKING_THREADS: usize = 4;
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Bytes of stack of such a thread. Less than a huge page: a stack of 2 MiB may get one at its first
/// touch.
const BLOCKING_STACK: usize = 512 << 10;

/// How long the last events may take to reach containerd.
const FLUSH: Duration = Duration::from_secs(10);

/// How long containerd may take to ask for the end after the last task's deletion. To ask is the next
/// thing that it does.
const ABANDONED: Duration = Duration::from_secs(10);

/// Serves until told to stop.
///
/// # Errors
/// Stdin is not the socket that `start` made, or the configuration is wrong.
pub(crate) fn run(args: Args) -> Result<(), BoxError> {
    forbid_dumps()?;
    // Read from a file once, and with a panic where there is no descriptor for that: not later.
    let _ = rustix::param::page_size();
    let listener = inherited_socket()?;
    let mut config = config::load(None)?;
    if args.debug {
        config.log.level = Level::Debug;
    }
    log_to_stderr(config.log.level)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .thread_stack_size(BLOCKING_STACK)
        .build()?;
    let result = runtime.block_on(serve(&args, listener, config));
    // Blocking work still under way is for something that has ended.
    runtime.shutdown_background();
    if let Err(error) = &result {
        tracing::error!(%error, "the shim failed");
    }
    let _ = std::fs::remove_file(socket_of(&args));
    result
}

/// What containers are told (environments, say) passes through this process's memory, which must not
/// become a file when it dies.
fn forbid_dumps() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    #[cfg(target_os = "linux")]
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Stdin, which `start` made the listening socket; then stdin is /dev/null.
fn inherited_socket() -> Result<UnixListener, BoxError> {
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let listener = UnixListener::from(socket);
    listener
        .local_addr()
        .map_err(|_| "Stdin is not a socket; containerd runs this program with \"start\" first")?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    Ok(listener)
}

fn log_to_stderr(level: Level) -> Result<(), BoxError> {
    tracing_subscriber::fmt()
        .with_max_level(level.as_str().parse::<LevelFilter>()?)
        .with_ansi(false)
        // By default it says on stderr that it could not write to stderr, and panics as that fails too:
        // a containerd that is gone, or reads slowly, must cost no more than a line.
        .log_internal_errors(false)
        .with_writer(io::stderr)
        .init();
    Ok(())
}

async fn serve(args: &Args, listener: UnixListener, config: Resolved) -> Result<(), BoxError> {
    let (events, queue) = mpsc::unbounded_channel();
    let sandbox = Sandbox::new(config, events);
    let done = Arc::new(Notify::new());
    let (close, closing) = oneshot::channel();
    let publisher = tokio::spawn(Publisher::new(args).run(queue, closing));
    let task = Task::new(args, sandbox.clone(), Arc::clone(&done));

    // Before there is a request whose work could take the descriptors for it.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener)?)
        .register_service(services(task.clone()));
    server.start().await?;
    let signal = tokio::select! {
        () = done.notified() => None,
        () = task.abandoned(ABANDONED) => {
            tracing::info!("ended, as nobody asks for it");
            None
        }
        _ = terminate.recv() => Some("SIGTERM"),
        _ = interrupt.recv() => Some("SIGINT"),
    };
    // Connections end with the process: to wait for their handlers is to wait for clients.
    server.stop_listen().await;
    if let Some(signal) = signal {
        tracing::info!(signal, "ended by a signal");
        // containerd finds the connection broken, runs `delete` and tells of the exit: to tell of it
        // here as well would be to tell twice.
        flush(close, publisher).await;
        sandbox.end().await;
    } else {
        sandbox.end().await;
        flush(close, publisher).await;
    }
    Ok(())
}

/// Has the publisher deliver what is queued, and nothing that comes later.
async fn flush(close: oneshot::Sender<()>, publisher: JoinHandle<()>) {
    let _ = close.send(());
    if tokio::time::timeout(FLUSH, publisher).await.is_err() {
        tracing::warn!("containerd did not take the last events");
    }
}
