//! One tokio runtime a process, made on first use, ended at interpreter exit: calls that still wait
//! then (in daemon threads) return with an error, while the interpreter can still take them back.
//!
//! After a fork the parent's runtime has no threads in the child: the child makes its own on first
//! use, and never touches or frees the parent's. No lock is held across a fork.

use std::{
    env,
    pin::pin,
    process,
    ptr::null_mut,
    sync::{
        Mutex,
        atomic::{AtomicPtr, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pyo3::{exceptions::PyRuntimeError, prelude::*};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::watch,
    time::sleep,
};
use torchft_server::lock::lock;

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
    /// True from the interpreter's exit on.
    ended: watch::Sender<bool>,
    /// Calls that are inside [`wait`] now.
    waiting: AtomicUsize,
}

/// The runtime of the process that last made one; never freed, since others may be reading it.
static CURRENT: AtomicPtr<Entry> = AtomicPtr::new(null_mut());

/// The handle of this process's runtime.
pub fn handle() -> PyResult<Handle> {
    Ok(entry()?.handle.clone())
}

/// Drives `future` to its end without the GIL, looking for signals; a signal's exception drops it.
pub fn wait<T: Send>(py: Python<'_>, future: impl Future<Output = T> + Send) -> PyResult<T> {
    let entry = entry()?;
    let _counted = Counted::new(&entry.waiting);
    let mut ended = entry.ended.subscribe();
    let mut future = pin!(future);
    loop {
        let turn = async {
            tokio::select! {
                biased;
                done = future.as_mut() => Turn::Done(done),
                _ = ended.wait_for(|ended| *ended) => Turn::Ended,
                () = sleep(SIGNALS) => Turn::LookForSignals,
            }
        };
        match py.detach(|| entry.handle.block_on(turn)) {
            Turn::Done(value) => return Ok(value),
            Turn::Ended => return Err(exiting()),
            Turn::LookForSignals => py.check_signals()?,
        }
    }
}

enum Turn<T> {
    Done(T),
    Ended,
    LookForSignals,
}

/// Counts one for as long as it lives.
struct Counted<'c>(&'c AtomicUsize);

impl<'c> Counted<'c> {
    fn new(count: &'c AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Starts `future` if this process's runtime is there; at exit there is nothing left to do.
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    if let Some(entry) = current().filter(|entry| !*entry.ended.borrow()) {
        entry.handle.spawn(future);
    }
}

/// Ends this process's runtime, and with it every server, port and connection of the extension.
pub fn end() {
    let Some(entry) = current() else { return };
    entry.ended.send_replace(true);
    let begun = Instant::now();
    while entry.waiting.load(Ordering::Acquire) > 0 && begun.elapsed() < END {
        thread::sleep(Duration::from_millis(1));
    }
    let runtime = lock(&entry.runtime).take();
    if let Some(runtime) = runtime {
        runtime.shutdown_timeout(END);
    }
}

fn entry() -> PyResult<&'static Entry> {
    let entry = match current() {
        Some(entry) => entry,
        None => make()?,
    };
    if *entry.ended.borrow() {
        return Err(exiting());
    }
    Ok(entry)
}

fn exiting() -> PyErr {
    PyRuntimeError::new_err("the interpreter is exiting")
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
        ended: watch::Sender::new(false),
        waiting: AtomicUsize::new(0),
    }));
    let swap = CURRENT.compare_exchange(before, entry, Ordering::AcqRel, Ordering::Acquire);
    match (swap, current()) {
        // Another thread was faster: its runtime is used, and this one ends.
        (Err(_), Some(theirs)) => {
            let ours = lock(&entry.runtime).take();
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
            "TOKIO_WORKER_THREADS is {given:?}, but must be an integer of at least 1"
        ))),
    }
}
