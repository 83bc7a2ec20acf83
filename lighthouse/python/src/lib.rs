//! The Python module `torchft._torchft`: the servers and clients as Python classes. It only converts.

mod command;
mod errors;
mod forked;
mod host;
mod json;
mod lighthouse;
mod manager;
mod quorum;
mod runtime;

use std::time::Duration;

use pyo3::prelude::*;

/// Ends this process within a second of its parent's end, such as a killed torchrun agent.
///
/// Args:
///     poll_ms: how often to look, in milliseconds; from 1 to 1000.
///
/// Does nothing when it was called before in this process.
#[pyfunction]
#[pyo3(signature = (poll_ms=250))]
fn watch_parent(py: Python<'_>, poll_ms: u64) -> PyResult<()> {
    if !(1..=1000).contains(&poll_ms) {
        let message = format!("poll_ms is {poll_ms}, but must be from 1 to 1000");
        return Err(errors::settings(py, message));
    }
    torchft_server::process::watch_parent(Duration::from_millis(poll_ms));
    Ok(())
}

/// Ends the runtime and with it every server of this process; called at exit.
#[pyfunction]
fn _end(py: Python<'_>) {
    py.detach(runtime::end);
}

/// The servers and clients of torchft that are written in Rust.
#[pymodule]
mod _torchft {
    #[pymodule_export]
    use super::{
        _end,
        command::lighthouse_main,
        lighthouse::{LighthouseClient, LighthouseServer},
        manager::{ManagerClient, ManagerServer, QuorumResult},
        quorum::{Quorum, QuorumMember, Timestamp},
        watch_parent,
    };
    use pyo3::{prelude::*, wrap_pyfunction};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let end = wrap_pyfunction!(super::_end, module)?;
        module
            .py()
            .import("atexit")?
            .call_method1("register", (end,))?;
        Ok(())
    }
}
