//! The time that the pure core is given: how long ago this clock was started.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Turns instants into the core's durations and back.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that starts now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// Time since the start.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// The instant at which [`Clock::now`] is `moment`.
    #[must_use]
    pub fn instant(&self, moment: Duration) -> Instant {
        self.origin + moment
    }
}

/// Milliseconds since 1970: the origin of quorum ids.
#[must_use]
pub fn wall_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
