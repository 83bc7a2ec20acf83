//! One timer for a state machine that says when it wants to be called next.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::clock::Clock;

const NEVER: u64 = u64::MAX;

/// Expires at the earliest moment it was set to; it may expire early, never late.
#[derive(Debug)]
pub struct Timer {
    /// Microseconds on the clock.
    at: AtomicU64,
    moved: Notify,
}

impl Timer {
    /// A timer that is not set.
    #[must_use]
    pub fn new() -> Self {
        let at = AtomicU64::new(NEVER);
        let moved = Notify::new();
        Self { at, moved }
    }

    /// Makes it expire at `moment` at the latest.
    pub fn set(&self, moment: Option<Duration>) {
        let at = moment.map_or(NEVER, |m| u64::try_from(m.as_micros()).unwrap_or(NEVER));
        if self.at.fetch_min(at, Ordering::AcqRel) > at {
            self.moved.notify_one();
        }
    }

    /// Waits until it expires, and unsets it.
    pub async fn expired(&self, clock: Clock) {
        loop {
            match self.at.load(Ordering::Acquire) {
                NEVER => self.moved.notified().await,
                at => {
                    // Rounded up, so that the moment has come when it expires.
                    let moment = Duration::from_micros(at.saturating_add(1));
                    let wake = sleep_until(Instant::from_std(clock.instant(moment)));
                    tokio::select! {
                        () = wake => break,
                        () = self.moved.notified() => {}
                    }
                }
            }
        }
        self.at.store(NEVER, Ordering::Release);
    }
}

impl Default for Timer {
    fn default() -> Self {
        Self::new()
    }
}
