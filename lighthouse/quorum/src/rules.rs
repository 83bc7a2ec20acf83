//! The settings of a lighthouse, checked when it starts.

use std::time::Duration;

use thiserror::Error;

/// For how many heartbeat timeouts a dead replica is remembered, so that the status still shows it.
const TIMEOUTS_REMEMBERED: u32 = 10;
/// How often in a heartbeat timeout the coordinator asks to be woken while it watches heartbeats.
const WAKES_PER_TIMEOUT: u32 = 4;
/// After a longer gap between two events than this part of the heartbeat timeout, the lighthouse
/// itself did not run.
const PAUSES_PER_TIMEOUT: u32 = 2;

/// When a quorum may form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// A quorum has at least this many members; at least 1.
    pub min_replicas: usize,
    /// How long those that ask wait for groups that send heartbeats but have not asked, counted from
    /// the first request.
    pub join_timeout: Duration,
    /// A replica that sent no heartbeat for this long is dead; above 0.
    pub heartbeat_timeout: Duration,
}

impl Rules {
    /// These rules, or the reason why they cannot be used.
    pub fn check(self) -> Result<Self, BadRules> {
        if self.min_replicas == 0 {
            return Err(BadRules::NoMinimum);
        }
        if self.heartbeat_timeout.is_zero() {
            return Err(BadRules::NoHeartbeat);
        }
        Ok(self)
    }

    /// How long after the last event the coordinator asks to be woken, to know that it still runs.
    pub(crate) fn wake_interval(&self) -> Duration {
        self.heartbeat_timeout / WAKES_PER_TIMEOUT
    }

    /// Whether the lighthouse did not run, given this long without an event: it would have been woken
    /// after [`Rules::wake_interval`].
    pub(crate) fn is_pause(&self, gap: Duration) -> bool {
        gap > self.heartbeat_timeout / PAUSES_PER_TIMEOUT
    }

    /// How long a replica that sends no heartbeats is remembered.
    pub(crate) fn forget_after(&self) -> Duration {
        self.heartbeat_timeout * TIMEOUTS_REMEMBERED
    }
}

/// Why rules cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadRules {
    /// `min_replicas` is 0.
    #[error("min_replicas is 0: a quorum has at least one member, so give 1 or more")]
    NoMinimum,
    /// `heartbeat_timeout` is 0.
    #[error("the heartbeat timeout is 0, so no replica would ever be healthy: give 1 ms or more")]
    NoHeartbeat,
}
