//! The manager servers of this process, by address: a client in the same process calls them
//! directly, and saves two trips through the kernel a call.

use std::{
    collections::HashMap,
    process,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak},
};

use super::desk::Desk;

/// The process is part of the key: after a fork the parent's servers are not ours.
type Key = (u32, String);

static DESKS: LazyLock<Mutex<HashMap<Key, Weak<Desk>>>> = LazyLock::new(Mutex::default);

/// Makes `desk` known.
pub fn announce(address: &str, desk: &Arc<Desk>) {
    desks().insert(key(address), Arc::downgrade(desk));
}

/// Forgets the desk at `address`.
pub fn withdraw(address: &str) {
    desks().remove(&key(address));
}

/// The desk of this process that serves `address`.
pub fn find(address: &str) -> Option<Arc<Desk>> {
    desks().get(&key(address))?.upgrade()
}

fn key(address: &str) -> Key {
    (process::id(), address.to_owned())
}

fn desks() -> MutexGuard<'static, HashMap<Key, Weak<Desk>>> {
    DESKS.lock().unwrap_or_else(PoisonError::into_inner)
}
