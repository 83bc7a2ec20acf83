//! Why no quorum forms yet, as a person reads it: the number that is short, who is missing, and for
//! how long that may go on.

use std::fmt;
use std::time::Duration;

use crate::decide::Wait;
use crate::member::ReplicaId;

/// A list of ids in a sentence stops after this many.
const NAMED: usize = 8;

/// A reason to wait, with the names of those it hangs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The reason.
    pub why: Wait,
    /// Healthy ids that could change it by asking, sorted.
    pub missing: Vec<ReplicaId>,
    /// When this was true, on the machine's clock.
    pub now: Duration,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason(f)?;
        match (self.missing.is_empty(), self.why) {
            (_, Wait::NobodyAsks) => Ok(()),
            (true, _) => f.write_str("; no other healthy replica is known"),
            (false, _) => write!(f, "; healthy, not asking: {}", Names(&self.missing)),
        }
    }
}

impl Waiting {
    fn reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.why {
            Wait::NobodyAsks => f.write_str("no healthy replica asks for a quorum"),
            Wait::ShrunkToNobody => f.write_str(
                "shrink_only is asked for, and no member of the last quorum asks: \
                 ask without shrink_only to begin a new one",
            ),
            Wait::Listening { until } => {
                let left = until.saturating_sub(self.now).as_millis();
                write!(
                    f,
                    "this lighthouse has just started, in a job that was there before: for {left} \
                     ms it listens who else is there"
                )
            }
            Wait::TooFew { have, need } => {
                write!(f, "{have} of at least {need} replicas ask (min_replicas)")
            }
            Wait::NoMajority { have, healthy } => {
                write!(
                    f,
                    "{have} of {healthy} healthy replicas ask, not more than half"
                )
            }
            Wait::Stragglers { until, .. } => {
                let left = until.saturating_sub(self.now).as_millis();
                write!(
                    f,
                    "the healthy who do not ask have {left} ms left (join_timeout)"
                )
            }
            Wait::UpToDate { floor, .. } => write!(
                f,
                "nobody who asks has reached step {floor} of the last quorum; its members that \
                 heartbeat may have, so they are waited for"
            ),
        }
    }
}

/// Ids in a sentence.
pub(crate) struct Names<'a>(pub(crate) &'a [ReplicaId]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, id) in self.0.iter().take(NAMED).enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{id}")?;
        }
        match self.0.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}
