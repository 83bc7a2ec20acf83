//! The command `torchft_lighthouse`.

use clap::Parser;
use pyo3::{exceptions::PyKeyboardInterrupt, prelude::*};
use torchft_server::{
    lighthouse, log,
    options::{Cli, LighthouseOptions},
};

use crate::{host, runtime};

/// Runs a lighthouse until SIGTERM or SIGINT.
///
/// Args:
///     argv: the command line, its first item the command's name; by default `sys.argv`.
///
/// Returns:
///     The exit code: 0 after a signal, 1 when it could not start, 2 for a wrong command line.
#[pyfunction]
#[pyo3(signature = (argv=None))]
pub fn lighthouse_main(py: Python<'_>, argv: Option<Vec<String>>) -> PyResult<i32> {
    let argv = match argv {
        Some(argv) => argv,
        None => py.import("sys")?.getattr("argv")?.extract()?,
    };
    let cli = match Cli::try_parse_from(argv) {
        Ok(cli) => cli,
        Err(message) => return Ok(explain(&message)),
    };
    log::install("info");
    let host_name = host::name(py)?;
    let runtime = runtime::handle()?;
    let options = LighthouseOptions::from(cli);
    match py.detach(|| runtime.block_on(lighthouse::run(options, &host_name))) {
        Ok(()) => forget_interrupt(py).map(|()| 0),
        Err(error) => {
            eprintln!("torchft_lighthouse: {error}");
            Ok(1)
        }
    }
}

fn explain(message: &clap::Error) -> i32 {
    // Help and version go to stdout and are no error; clap knows which is which.
    let _ = message.print();
    message.exit_code()
}

/// Python's own handler has noted the SIGINT that ended us; it is no error here.
fn forget_interrupt(py: Python<'_>) -> PyResult<()> {
    match py.check_signals() {
        Err(error) if error.is_instance_of::<PyKeyboardInterrupt>(py) => Ok(()),
        noted => noted,
    }
}
