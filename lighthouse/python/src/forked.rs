//! A handle that belongs to the process that made it.
//!
//! After a fork its sockets and tasks are the parent's: the child gets a clear error on use, and
//! its drop of the handle does nothing.

use std::{mem::ManuallyDrop, process};

use pyo3::{exceptions::PyRuntimeError, prelude::*};

/// `T`, usable in one process only.
pub struct OneProcess<T> {
    name: &'static str,
    pid: u32,
    inner: ManuallyDrop<T>,
}

impl<T> OneProcess<T> {
    /// Wraps `inner`; `name` is its name in error messages.
    pub fn new(name: &'static str, inner: T) -> Self {
        let inner = ManuallyDrop::new(inner);
        let pid = process::id();
        Self { name, pid, inner }
    }

    /// The handle, or an error after a fork.
    pub fn get(&self) -> PyResult<&T> {
        if self.is_ours() {
            return Ok(&self.inner);
        }
        Err(PyRuntimeError::new_err(format!(
            "this {} was made in process {} and cannot be used after a fork, in process {}: \
             make a new one here",
            self.name,
            self.pid,
            process::id()
        )))
    }

    fn is_ours(&self) -> bool {
        self.pid == process::id()
    }
}

impl<T> Drop for OneProcess<T> {
    fn drop(&mut self) {
        if self.is_ours() {
            #[allow(unsafe_code)]
            // SAFETY: dropped once, here; nothing reads it afterwards.
            unsafe {
                ManuallyDrop::drop(&mut self.inner);
            }
        }
    }
}
