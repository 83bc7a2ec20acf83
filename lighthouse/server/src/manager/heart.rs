//! A group's heartbeat: says to the lighthouse that it is alive, whatever happens to the lighthouse.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{error::CallError, lighthouse::LighthouseClient};

/// The least time that one heartbeat may take before a new connection is tried.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// Beats every `every`, for ever. A loss and a return of the lighthouse are told once each.
pub async fn beat(lighthouse: Arc<LighthouseClient>, replica_id: String, every: Duration) {
    let patience = every.max(LEAST_PATIENCE);
    let mut beats = interval(every);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_lost = false;
    loop {
        beats.tick().await;
        let beat = lighthouse.heartbeat(&replica_id, patience).await;
        tell(&lighthouse, &replica_id, is_lost, beat.as_ref().err());
        is_lost = beat.is_err();
    }
}

fn tell(lighthouse: &LighthouseClient, replica: &str, was_lost: bool, error: Option<&CallError>) {
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
