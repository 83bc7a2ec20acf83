//! A handle that belongs to the process that made it.
//!
//! After a fork its sockets and tasks are the parent's: the child gets a clear error on use, and
//! its drop of the handle does nothing.

use std::{mem::ManuallyDrop, process};

use pyo3::{exceptions::PyRuntimeError, prelude::*};

/// `T`, usable in one process only.
pub struct OneProcess<T> {
    pid: u32,
    inner: ManuallyDrop<T>,
}

impl<T> OneProcess<T> {
    pub fn new(inner: T) -> Self {
        let inner = ManuallyDrop::new(inner);
        let pid = process::id();
        Self { pid, inner }
    }

    /// The handle, or an error after a fork.
    pub fn get(&self) -> PyResult<&T> {
        if self.is_ours() {
            return Ok(&self.inner);
        }
        let what = std::any::type_name::<T>()
            .rsplit("::")
            .next()
            .unwrap_or("handle");
        Err(PyRuntimeError::new_err(format!(
            "this {what} was made in process {} and cannot be used after a fork in process {}: \
             make a new one here",
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
