//! One quorum decision, taken from counts alone, so that it costs the same for 2 groups and 512.
//!
//! Only ids that heartbeat count, and of these only those that ask are candidates. If any of them
//! asks `shrink_only`, all counts are over members of the last quorum. Then, in this order:
//!
//! 1. Nobody is a candidate: wait. An empty quorum never forms. And while this lighthouse is new,
//!    and a candidate was in a quorum of an earlier one: wait for a heartbeat timeout from the first
//!    that was heard, so that all of those can be heard.
//! 2. **The donor rule.** The *floor* is the highest step of the last quorum. If no candidate has
//!    reached it:
//!    - while another member of the last quorum heartbeats, wait for it: it may have the floor;
//!    - else, if a candidate was up to date in the last quorum, it went back on purpose: go on;
//!    - else, if a candidate was to heal in the last quorum, its donors are gone: it is refused,
//!      after the stragglers of rule 6 had their time;
//!    - else everybody of the last quorum is gone and new processes start afresh: go on.
//! 3. All members of the last quorum are candidates: a quorum forms at once, newcomers included.
//! 4. Fewer candidates than `min_replicas`: wait.
//! 5. Candidates are not more than half of all healthy ids: wait.
//! 6. Some healthy id has not asked: wait for it until `join_timeout` after the first candidate asked.
//! 7. A quorum forms.

use std::fmt;
use std::time::Duration;

use crate::rules::Rules;

/// How many ids there are of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Ids that heartbeat.
    pub healthy: usize,
    /// Of the healthy: those that ask for a quorum.
    pub asking: usize,
    /// Of those that ask: those whose step is at the floor or above.
    pub at_floor: usize,
}

/// All that a decision depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Over all ids.
    pub all: Count,
    /// Over the members of the last quorum.
    pub old: Count,
    /// Members of the last quorum, healthy or not; 0 if there was none.
    pub old_total: usize,
    /// Members of the last quorum that were up to date in it, heartbeat and ask.
    pub old_donors_asking: usize,
    /// Healthy ids that ask `shrink_only`.
    pub shrink_only: usize,
    /// The highest step of the last quorum.
    pub floor: i64,
    /// When the first of those that ask did so.
    pub first_asked: Option<Duration>,
    /// Until then a lighthouse that has just taken over from an earlier one listens who is there.
    pub listens_until: Option<Duration>,
}

/// What follows from a census.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Not yet.
    Wait(Wait),
    /// Refuse those who were to heal in the last quorum and ask below its floor; then decide again.
    StateLost,
    /// All candidates form a quorum.
    Form {
        /// Why now.
        why: Formed,
        /// No candidate has reached the floor, and that is accepted.
        below_floor: bool,
    },
}

/// Why no quorum forms yet, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nobody healthy asks.
    NobodyAsks,
    /// Somebody asks `shrink_only`, and no member of the last quorum asks.
    ShrunkToNobody,
    /// The lighthouse is new in a job that has had a quorum: those that it has not heard yet are
    /// given until then.
    Listening {
        /// When their time is up.
        until: Duration,
    },
    /// Below `min_replicas`.
    TooFew {
        /// Candidates.
        have: usize,
        /// `min_replicas`.
        need: usize,
    },
    /// Not more than half of the healthy ids ask.
    NoMajority {
        /// Candidates.
        have: usize,
        /// Healthy ids.
        healthy: usize,
    },
    /// Healthy ids that have not asked are given until then.
    Stragglers {
        /// How many.
        missing: usize,
        /// When their time is up.
        until: Duration,
    },
    /// No candidate has reached the floor, and members of the last quorum that heartbeat but do
    /// not ask may have: waited for as long as they heartbeat.
    UpToDate {
        /// How many.
        missing: usize,
        /// The step that the last quorum had reached.
        floor: i64,
    },
}

/// Why a quorum formed when it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formed {
    /// All members of the last quorum asked.
    Fast,
    /// Every healthy id asked.
    AllJoined,
    /// The join timeout passed.
    JoinTimeout {
        /// Healthy ids that were not waited for any longer.
        absent: usize,
    },
}

impl fmt::Display for Formed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fast => f.write_str("all members of the last quorum ask"),
            Self::AllJoined => f.write_str("all healthy replicas ask"),
            Self::JoinTimeout { absent } => {
                write!(f, "the join timeout passed ({absent} healthy do not ask)")
            }
        }
    }
}

/// Decides.
pub fn decide(rules: &Rules, census: &Census, now: Duration) -> Decision {
    let count = census.electorate();
    if count.asking == 0 {
        return Decision::Wait(census.nobody());
    }
    if let Some(until) = census.listens_until.filter(|until| now < *until) {
        return Decision::Wait(Wait::Listening { until });
    }
    let state = census.state();
    if let State::MayBeWith { missing } = state {
        let floor = census.floor;
        return Decision::Wait(Wait::UpToDate { missing, floor });
    }
    let below_floor = state == State::GivenUp;
    if census.old_total > 0 && census.old.asking == census.old_total {
        let why = Formed::Fast;
        return Decision::Form { why, below_floor };
    }
    let absent = count.healthy - count.asking;
    let until = census.first_asked.unwrap_or(now) + rules.join_timeout;
    let patient = absent > 0 && now < until;
    if state == State::Lost && !patient {
        return Decision::StateLost;
    }
    if let Some(wait) = too_small(rules, &count) {
        return Decision::Wait(wait);
    }
    if patient {
        let missing = absent;
        return Decision::Wait(Wait::Stragglers { missing, until });
    }
    let why = match absent {
        0 => Formed::AllJoined,
        absent => Formed::JoinTimeout { absent },
    };
    Decision::Form { why, below_floor }
}

/// Rules 4 and 5.
fn too_small(rules: &Rules, count: &Count) -> Option<Wait> {
    let (have, healthy, need) = (count.asking, count.healthy, rules.min_replicas);
    if have < need {
        return Some(Wait::TooFew { have, need });
    }
    if have <= healthy / 2 {
        return Some(Wait::NoMajority { have, healthy });
    }
    None
}

/// Where the state of the floor is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// With a candidate, or there is no floor.
    Here,
    /// With none of them, but healthy members of the last quorum have not asked.
    MayBeWith { missing: usize },
    /// Nowhere, and a candidate was to heal to it.
    Lost,
    /// Nowhere, and nobody who asks depends on it.
    GivenUp,
}

impl Census {
    /// Whether only members of the last quorum are let in.
    pub fn is_shrinking(&self) -> bool {
        self.shrink_only > 0 && self.old_total > 0
    }

    fn electorate(&self) -> Count {
        if self.is_shrinking() {
            self.old
        } else {
            self.all
        }
    }

    fn nobody(&self) -> Wait {
        if self.is_shrinking() {
            Wait::ShrunkToNobody
        } else {
            Wait::NobodyAsks
        }
    }

    fn state(&self) -> State {
        if self.old_total == 0 || self.electorate().at_floor > 0 {
            return State::Here;
        }
        let missing = self.old.healthy - self.old.asking;
        if missing > 0 {
            return State::MayBeWith { missing };
        }
        if self.old.asking > 0 && self.old_donors_asking == 0 {
            return State::Lost;
        }
        State::GivenUp
    }
}
