//! The groups whose manager server runs in this process, by address: a client in the same process
//! calls them directly, and saves two trips through the kernel for each call.

use std::{
    collections::HashMap,
    process,
    sync::{Arc, LazyLock, Mutex, Weak},
};

use super::state::GroupState;
use crate::lock::lock;

/// The process is part of the key: after a fork the parent's servers do not run in the child.
type Key = (u32, String);

static GROUPS: LazyLock<Mutex<HashMap<Key, Weak<GroupState>>>> = LazyLock::new(Mutex::default);

/// Registers the group that is served at `address`.
pub fn register(address: &str, state: &Arc<GroupState>) {
    lock(&GROUPS).insert(key(address), Arc::downgrade(state));
}

/// Removes the group that was served at `address`.
pub fn remove(address: &str) {
    lock(&GROUPS).remove(&key(address));
}

/// The group that this process serves at `address`.
pub fn find(address: &str) -> Option<Arc<GroupState>> {
    lock(&GROUPS).get(&key(address))?.upgrade()
}

fn key(address: &str) -> Key {
    (process::id(), address.to_owned())
}
