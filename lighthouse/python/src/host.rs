//! The name under which other hosts find this one.

use pyo3::prelude::*;

/// The host name, from Python's `socket.gethostname()`.
pub fn name(py: Python<'_>) -> PyResult<String> {
    py.import("socket")?.call_method0("gethostname")?.extract()
}
