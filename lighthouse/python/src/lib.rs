//! p
use pyo3::prelude::*;

/// The module.
#[pymodule]
mod _torchft {}
