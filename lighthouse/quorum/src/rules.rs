//! What a lighthouse is told at its start, checked at birth.

use std::time::Duration;

use thiserror::Error;

/// How many silences an id is remembered for, so that a person still sees who was lost.
const SILENCES_REMEMBERED: u32 = 10;
/// How often in a heartbeat timeout the machine wants to be woken while it counts silences.
const WAKES_PER_SILENCE: u32 = 4;
/// A gap between two events of this part of the heartbeat timeout is a pause of the machine itself.
const PAUSES_PER_SILENCE: u32 = 2;

/// When a quorum may form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// A quorum has at least this many members; at least 1.
    pub min_replicas: usize,
    /// How long those who ask wait for groups that heartbeat but have not asked, counted from the
    /// first who asked.
    pub join_timeout: Duration,
    /// An id that was silent for this long is not healthy; above 0.
    pub heartbeat_timeout: Duration,
}

impl Rules {
    /// These rules, or why they make no sense.
    pub fn check(self) -> Result<Self, BadRules> {
        if self.min_replicas == 0 {
            return Err(BadRules::NoMinimum);
        }
        if self.heartbeat_timeout.is_zero() {
            return Err(BadRules::NoHeartbeat);
        }
        Ok(self)
    }

    /// How long after the last event the machine wants to be woken, to know that it still runs.
    pub(crate) fn pulse(&self) -> Duration {
        self.heartbeat_timeout / WAKES_PER_SILENCE
    }

    /// Whether the machine itself was stopped, if nothing happened for so long: it would have been
    /// woken after [`Rules::pulse`].
    pub(crate) fn is_pause(&self, gap: Duration) -> bool {
        gap > self.heartbeat_timeout / PAUSES_PER_SILENCE
    }

    /// How long a silent id is remembered.
    pub(crate) fn memory(&self) -> Duration {
        self.heartbeat_timeout * SILENCES_REMEMBERED
    }
}

/// Why rules make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadRules {
    /// `min_replicas` is 0.
    #[error("min_replicas is 0: a quorum has at least one member, so give 1 or more")]
    NoMinimum,
    /// `heartbeat_timeout` is 0.
    #[error("the heartbeat timeout is 0: nobody would ever be healthy, so give 1 ms or more")]
    NoHeartbeat,
}
