//! The lighthouse as a command: serves until SIGTERM or SIGINT.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Lighthouse, StartError};
use crate::options::LighthouseOptions;

/// Runs in the current runtime until a signal; then everything is closed.
///
/// # Errors
/// The lighthouse did not start.
pub async fn run(options: LighthouseOptions, host_name: &str) -> Result<(), StartError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let lighthouse = Lighthouse::start(options, host_name).await?;
    let name = first(&mut terminate, &mut interrupt).await;
    tracing::info!("{name}: closing");
    lighthouse.stop().await;
    Ok(())
}

async fn first(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
