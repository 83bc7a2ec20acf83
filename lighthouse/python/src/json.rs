//! A member's data: a Python dict on one side, JSON text on the wire.

use pyo3::{prelude::*, types::PyDict};

/// The JSON text of `data`; `None` is the empty text.
pub fn write(py: Python<'_>, data: Option<&Bound<'_, PyDict>>) -> PyResult<String> {
    match data {
        Some(data) => py.import("json")?.call_method1("dumps", (data,))?.extract(),
        None => Ok(String::new()),
    }
}

/// The Python value of a JSON text; the empty text is `None`.
pub fn read(py: Python<'_>, text: &str) -> PyResult<Py<PyAny>> {
    if text.is_empty() {
        return Ok(py.None());
    }
    Ok(py.import("json")?.call_method1("loads", (text,))?.unbind())
}
