//! Logs: one line an event, on stderr, chosen by `RUST_LOG`.

use std::env;

use tracing_subscriber::EnvFilter;

/// Installs the subscriber, once; later calls change nothing.
///
/// `default` is the filter when `RUST_LOG` is not set, such as `warn`.
pub fn install(default: &str) {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(default))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .finish();
    // An error means that one is installed already.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

fn filter(default: &str) -> EnvFilter {
    match env::var("RUST_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::try_new(&wanted).unwrap_or_else(|error| {
            eprintln!("RUST_LOG={wanted} is not understood ({error}): logging as {default}");
            EnvFilter::new(default)
        }),
        _ => EnvFilter::new(default),
    }
}
