//! One tokio runtime a process, made on first use, ended at interpreter exit.
//!
//! After a fork the parent's runtime has no threads in the child: the child makes its own on first
//! use, and never touches or frees the parent's. No lock is held across a fork.

use std::{
    env,
    pin::pin,
    process,
    ptr::null_mut,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, Ordering},
    },
    time::Duration,
};

use pyo3::{exceptions::PyRuntimeError, prelude::*};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::timeout,
};

/// How often a blocked call looks for signals.
const SIGNALS: Duration = Duration::from_millis(100);
/// How long the runtime's threads may take to end.
const END: Duration = Duration::from_secs(1);
const DEFAULT_THREADS: usize = 2;

struct Entry {
    pid: u32,
    handle: Handle,
    /// Taken at exit.
    runtime: Mutex<Option<Runtime>>,
    ended: AtomicBool,
}

/// The runtime of the process that last made one; never freed, since others may be reading it.
static CURRENT: AtomicPtr<Entry> = AtomicPtr::new(null_mut());

/// The handle of this process's runtime.
pub fn handle() -> PyResult<Handle> {
    let entry = match current() {
        Some(entry) => entry,
        None => make()?,
    };
    if entry.ended.load(Ordering::Acquire) {
        return Err(PyRuntimeError::new_err("the interpreter is exiting"));
    }
    Ok(entry.handle.clone())
}

/// Drives `future` to its end without the GIL, looking for signals; a signal's exception drops it.
pub fn wait<T: Send>(py: Python<'_>, future: impl Future<Output = T> + Send) -> PyResult<T> {
    let handle = handle()?;
    let mut future = pin!(future);
    loop {
        let turn = py.detach(|| handle.block_on(async { timeout(SIGNALS, future.as_mut()).await }));
        match turn {
            Ok(done) => return Ok(done),
            Err(_elapsed) => py.check_signals()?,
        }
    }
}

/// Starts `future` if this process's runtime is there; at exit there is nothing left to do.
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    if let Some(entry) = current().filter(|entry| !entry.ended.load(Ordering::Acquire)) {
        entry.handle.spawn(future);
    }
}

/// Ends this process's runtime, and with it every server, port and connection of the extension.
pub fn end() {
    let Some(entry) = current() else { return };
    entry.ended.store(true, Ordering::Release);
    let runtime = entry
        .runtime
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(runtime) = runtime {
        runtime.shutdown_timeout(END);
    }
}

fn current() -> Option<&'static Entry> {
    let pointer = CURRENT.load(Ordering::Acquire);
    #[allow(unsafe_code)]
    // SAFETY: the pointer is null or comes from `Box::leak` in `make`, and is never freed.
    let entry = unsafe { pointer.as_ref() };
    entry.filter(|entry| entry.pid == process::id())
}

fn make() -> PyResult<&'static Entry> {
    let before = CURRENT.load(Ordering::Acquire);
    torchft_server::log::install("warn");
    let runtime = Builder::new_multi_thread()
        .worker_threads(threads()?)
        .thread_name("torchft")
        .enable_all()
        .build()?;
    let entry: &'static mut Entry = Box::leak(Box::new(Entry {
        pid: process::id(),
        handle: runtime.handle().clone(),
        runtime: Mutex::new(Some(runtime)),
        ended: AtomicBool::new(false),
    }));
    let swap = CURRENT.compare_exchange(before, entry, Ordering::AcqRel, Ordering::Acquire);
    match (swap, current()) {
        // Another thread was faster: its runtime is everybody's, ours ends unused.
        (Err(_), Some(theirs)) => {
            let ours = entry
                .runtime
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            ours.into_iter().for_each(Runtime::shutdown_background);
            Ok(theirs)
        }
        _ => Ok(entry),
    }
}

fn threads() -> PyResult<usize> {
    let Ok(given) = env::var("TOKIO_WORKER_THREADS") else {
        return Ok(DEFAULT_THREADS);
    };
    match given.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(PyRuntimeError::new_err(format!(
            "TOKIO_WORKER_THREADS is {given:?}, but must be a whole number from 1"
        ))),
    }
}
