//! Why no quorum forms yet, as a sentence: which number is too low, which replicas are missing, and
//! for how long.

use std::fmt;
use std::time::Duration;

use crate::decide::Wait;
use crate::member::ReplicaId;

/// How many ids a sentence lists.
const NAMED: usize = 8;

/// A reason to wait, with the replicas that could end it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The reason.
    pub why: Wait,
    /// Healthy replicas that could end it by asking, sorted.
    pub missing: Vec<ReplicaId>,
    /// When this was true, on the coordinator's clock.
    pub now: Duration,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason(f)?;
        match (self.missing.is_empty(), self.why) {
            (_, Wait::NobodyAsks) => Ok(()),
            (true, _) => f.write_str("; no other healthy replica is known"),
            (false, _) => write!(f, "; healthy, but not asking: {}", Names(&self.missing)),
        }
    }
}

impl Waiting {
    fn reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.why {
            Wait::NobodyAsks => f.write_str("no healthy replica asks for a quorum"),
            Wait::NoMemberAsks => f.write_str(
                "a replica asks with shrink_only, but no member of the last quorum asks: \
                 ask without shrink_only to form a quorum of new members",
            ),
            Wait::Listening { until } => {
                let left = until.saturating_sub(self.now).as_millis();
                write!(
                    f,
                    "this lighthouse was restarted during a job: for {left} ms it waits for heartbeats of \
                     the job's other replicas"
                )
            }
            Wait::TooFew { have, need } => {
                write!(f, "{have} of at least {need} replicas ask (min_replicas)")
            }
            Wait::NoMajority { have, healthy } => {
                write!(
                    f,
                    "{have} of {healthy} healthy replicas ask, and more than half are needed"
                )
            }
            Wait::Stragglers { until, .. } => {
                let left = until.saturating_sub(self.now).as_millis();
                write!(
                    f,
                    "healthy replicas that do not ask have {left} ms left (join_timeout)"
                )
            }
            Wait::UpToDate { floor, .. } => write!(
                f,
                "no replica that asks has reached step {floor} of the last quorum: waiting for its other \
                 members that still send heartbeats, since they may have it"
            ),
        }
    }
}

/// A list of ids in a sentence.
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
