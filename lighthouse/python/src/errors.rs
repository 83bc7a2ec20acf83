//! The Python exception of a failed call: `TimeoutError` for a deadline, else a class of
//! `torchft.errors`, which are all `RuntimeError`s.

use pyo3::{
    exceptions::{PyRuntimeError, PyTimeoutError},
    prelude::*,
};
use torchft_server::error::CallError;

/// The Python exception for `error`.
pub fn raise(py: Python<'_>, error: &CallError) -> PyErr {
    let message = error.to_string();
    match error {
        CallError::Deadline(_) | CallError::Silent(_) => PyTimeoutError::new_err(message),
        CallError::Unreachable(_) | CallError::LighthouseAway(_) => {
            ours(py, "UnreachableError", message)
        }
        CallError::Unavailable(_) | CallError::Failed { .. } => ours(py, "TorchftError", message),
        CallError::StateLost(_) => ours(py, "StateLostError", message),
        CallError::Mismatch(_) => ours(py, "MismatchError", message),
        CallError::Refused(_) => ours(py, "QuorumError", message),
        CallError::Address(_) => ours(py, "SettingsError", message),
    }
}

/// An unusable argument.
pub fn settings(py: Python<'_>, message: impl ToString) -> PyErr {
    ours(py, "SettingsError", message.to_string())
}

/// An exception of `torchft.errors`, imported when it is needed.
fn ours(py: Python<'_>, class: &str, message: String) -> PyErr {
    let found = py
        .import("torchft.errors")
        .and_then(|errors| errors.getattr(class));
    match found.and_then(|class| class.call1((message.as_str(),))) {
        Ok(error) => PyErr::from_value(error),
        Err(_not_installed) => PyRuntimeError::new_err(message),
    }
}
