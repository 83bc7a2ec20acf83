//! Logs: one line an event, on stderr, chosen by `RUST_LOG`.

use tracing_subscriber::EnvFilter;

/// Installs the subscriber, once; later calls change nothing.
///
/// `default` is the filter when `RUST_LOG` is not set, such as `warn`.
pub fn install(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .finish();
    // An error means that one is installed already.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
