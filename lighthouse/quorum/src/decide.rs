//! One quorum decision, made from counts alone, so that it costs the same for 2 groups and 512.
//!
//! Only replicas that send heartbeats are counted, and of these only those that ask are candidates.
//! If any of them asks `shrink_only`, all counts are over members of the last quorum. Then, in order:
//!
//! 1. Nobody is a candidate: wait. An empty quorum never forms. And while this lighthouse is new,
//!    and a candidate was in a quorum of an earlier one: wait for a heartbeat timeout from the first
//!    one that was heard, so that heartbeats of all of those can arrive.
//! 2. **The donor rule.** The *floor* is the highest step of the last quorum. If no candidate has
//!    reached it:
//!    - while another member of the last quorum sends heartbeats, wait for it: it may have the floor;
//!    - else, if a candidate was up to date in the last quorum, it went back on purpose: go on;
//!    - else, if a candidate was to heal in the last quorum, its donors are gone: it is refused,
//!      after the time that rule 6 gives to the others;
//!    - else all members of the last quorum are gone and new processes start again: go on.
//! 3. All members of the last quorum are candidates: a quorum forms at once, newcomers included.
//! 4. Fewer candidates than `min_replicas`: wait.
//! 5. Candidates are not more than half of all healthy ids: wait.
//! 6. Some healthy id has not asked: wait for it until `join_timeout` after the first candidate asked.
//! 7. A quorum forms.

use std::fmt;
use std::time::Duration;

use crate::rules::Rules;

/// Numbers of replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Replicas that send heartbeats.
    pub healthy: usize,
    /// Of the healthy: those that ask for a quorum.
    pub asking: usize,
    /// Of those that ask: those whose step is at the floor or above.
    pub at_floor: usize,
}

/// The counts and times on which a decision depends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Over all replicas.
    pub all: Count,
    /// Over the members of the last quorum.
    pub last: Count,
    /// Healthy replicas that ask and run another generation of managers than the job. Nothing else
    /// counts them.
    pub held_back: usize,
    /// Members of the last quorum, healthy or not; 0 if there was none.
    pub last_total: usize,
    /// Members of the last quorum that were up to date in it, heartbeat and ask.
    pub last_donors_asking: usize,
    /// Healthy replicas that ask `shrink_only`.
    pub shrink_only: usize,
    /// The highest step of the last quorum.
    pub floor: i64,
    /// When the first of those that ask did so.
    pub first_asked: Option<Duration>,
    /// Until then a lighthouse that was restarted during a job only collects heartbeats.
    pub listens_until: Option<Duration>,
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// No quorum forms yet.
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
    /// A replica asks `shrink_only`, and no member of the last quorum asks.
    NoMemberAsks,
    /// The lighthouse was restarted during a job: it waits for heartbeats of the job's replicas.
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
    /// At most half of the healthy replicas ask.
    NoMajority {
        /// Candidates.
        have: usize,
        /// Healthy replicas.
        healthy: usize,
    },
    /// Healthy replicas that have not asked are waited for.
    Stragglers {
        /// How many.
        missing: usize,
        /// When their time is up.
        until: Duration,
    },
    /// No candidate has reached the floor. Members of the last quorum that send heartbeats but do not
    /// ask may have: they are waited for as long as they send heartbeats.
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
    /// Every healthy replica asked.
    AllJoined,
    /// The join timeout passed.
    JoinTimeout {
        /// Healthy replicas that did not ask in time.
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

/// Decides whether a quorum forms now, by the rules in the head of this file.
pub fn decide(rules: &Rules, counts: &Counts, now: Duration) -> Decision {
    let count = counts.eligible();
    if count.asking == 0 {
        return Decision::Wait(counts.nobody());
    }
    if let Some(until) = counts.listens_until.filter(|until| now < *until) {
        return Decision::Wait(Wait::Listening { until });
    }
    let state = counts.floor_state();
    if let FloorState::WithAbsent { missing } = state {
        let floor = counts.floor;
        return Decision::Wait(Wait::UpToDate { missing, floor });
    }
    let below_floor = state == FloorState::GivenUp;
    if counts.last_total > 0 && counts.last.asking == counts.last_total {
        let why = Formed::Fast;
        return Decision::Form { why, below_floor };
    }
    let absent = count.healthy - count.asking;
    let until = counts.first_asked.unwrap_or(now) + rules.join_timeout;
    let still_waits = absent > 0 && now < until;
    if state == FloorState::Lost && !still_waits {
        return Decision::StateLost;
    }
    if let Some(wait) = too_small(rules, &count) {
        return Decision::Wait(wait);
    }
    if still_waits {
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

/// Where the training state of the floor is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FloorState {
    /// A candidate has it, or there is no floor.
    Present,
    /// No candidate has it, but healthy members of the last quorum have not asked.
    WithAbsent { missing: usize },
    /// Nobody has it, and a candidate was told to heal to it.
    Lost,
    /// Nobody has it, and no candidate depends on it.
    GivenUp,
}

impl Counts {
    /// Whether only members of the last quorum are admitted.
    pub fn is_shrinking(&self) -> bool {
        self.shrink_only > 0 && self.last_total > 0
    }

    fn eligible(&self) -> Count {
        if self.is_shrinking() {
            self.last
        } else {
            self.all
        }
    }

    fn nobody(&self) -> Wait {
        if self.is_shrinking() {
            Wait::NoMemberAsks
        } else {
            Wait::NobodyAsks
        }
    }

    fn floor_state(&self) -> FloorState {
        if self.last_total == 0 || self.eligible().at_floor > 0 {
            return FloorState::Present;
        }
        let missing = self.last.healthy - self.last.asking;
        if missing > 0 {
            return FloorState::WithAbsent { missing };
        }
        if self.last.asking > 0 && self.last_donors_asking == 0 {
            return FloorState::Lost;
        }
        FloorState::GivenUp
    }
}
