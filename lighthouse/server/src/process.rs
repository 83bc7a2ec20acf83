//! Ends this process: when an operator asks for it, or when its parent is gone.

use std::{
    os::unix::process::parent_id,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

#[allow(unsafe_code)]
unsafe extern "C" {
    fn _exit(code: i32) -> !;
}

/// The process whose parent is already watched, 0 if there is none. A forked child inherits the
/// parent's value, which differs from its own id.
static WATCHED_IN: AtomicU32 = AtomicU32::new(0);

/// Ends the process at once. Exit handlers do not run: with threads inside collectives they may
/// hang, and a process that was told to end must end.
pub fn end_process(code: i32, why: &str) -> ! {
    tracing::error!("this process ends with exit code {code}: {why}");
    #[allow(unsafe_code)]
    // SAFETY: `_exit` takes no pointer and does not return.
    unsafe {
        _exit(code)
    }
}

/// Starts a thread that ends this process when its parent ends. Later calls in the same process do
/// nothing.
///
/// A killed torchrun agent cannot stop its workers, which would train on as orphans.
pub fn watch_parent(poll: Duration) {
    let me = std::process::id();
    if WATCHED_IN.swap(me, Ordering::SeqCst) == me {
        return;
    }
    let parent = parent_id();
    let watching = thread::Builder::new().name("torchft-parent".into());
    let started = watching.spawn(move || {
        while parent_id() == parent {
            thread::sleep(poll);
        }
        end_process(1, &format!("its parent process {parent} is gone"));
    });
    if let Err(error) = started {
        tracing::error!(
            "no thread could be started to watch the parent process: if it ends, this process goes on: {error}"
        );
    }
}
