//! A group's heartbeats: they tell the lighthouse that it is alive, and go on while that is away.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{error::CallError, lighthouse::LighthouseClient};

/// The least time that one heartbeat may take before a new connection is tried.
const MIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends a heartbeat every `every`, for ever. Logs once when the lighthouse stops answering, and
/// once when it answers again.
pub async fn send(lighthouse: Arc<LighthouseClient>, replica_id: String, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_lost = false;
    loop {
        ticks.tick().await;
        let reply = lighthouse
            .heartbeat(&replica_id, every.max(MIN_TIMEOUT))
            .await;
        log_change(&lighthouse, &replica_id, is_lost, reply.as_ref().err());
        is_lost = reply.is_err();
    }
}

fn log_change(
    lighthouse: &LighthouseClient,
    replica: &str,
    was_lost: bool,
    error: Option<&CallError>,
) {
    match (was_lost, error) {
        (false, Some(error)) => tracing::warn!(
            %replica,
            "lost the {}, trying again until it is back: {error}",
            lighthouse.name()
        ),
        (true, None) => tracing::warn!(%replica, "the {} is back", lighthouse.name()),
        _ => {}
    }
}
