//! The name under which others find this machine.

use pyo3::prelude::*;

/// As `socket.gethostname()` says.
pub fn name(py: Python<'_>) -> PyResult<String> {
    py.import("socket")?.call_method0("gethostname")?.extract()
}
