//! Gathers the quorum requests of a group's ranks: when all have asked, one request goes to the
//! lighthouse.
//!
//! - The request has the *lowest* step of the ranks and the highest number of discarded steps. It
//!   asks `shrink_only` and `init_sync` if any rank does.
//! - Its deadline is the earliest of its callers', also for every retry.
//! - Ranks at different steps become equal by healing. If no other group is ahead of the slowest
//!   rank, all are refused.
//! - A caller that leaves ends the round: the request is cancelled, all other callers are refused
//!   at once, and a late answer is dropped.
//! - When a request has failed for good, all callers are refused at once, with its reason.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::assign::{Assignment, assign};
pub use crate::gather_error::{Failure, FailureKind, GatherRefusal};
use crate::member::{CallId, Generation, Handle, Member, Quorum, ReplicaId};

/// The first pause before a request is sent again; each is half as long again as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The lighthouse must answer before the callers give up: by a tenth of their time, at most this.
const LONGEST_MARGIN: Duration = Duration::from_millis(100);

/// The group whose ranks are gathered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The group's name in the quorum.
    pub replica_id: ReplicaId,
    /// Its manager server, `http://host:port`.
    pub address: String,
    /// Its rendezvous store, `host:port`.
    pub store_address: String,
    /// How many local ranks must ask.
    pub world_size: u64,
    /// How often a request that the lighthouse failed is sent again. One that did not reach the
    /// lighthouse is sent again until the callers' deadline, whatever this says.
    pub quorum_retries: u32,
}

/// The request of one local rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankAsk {
    /// The rank that asks.
    pub group_rank: i64,
    /// The last step it committed.
    pub step: i64,
    /// Where its state can be fetched; passed on unread.
    pub checkpoint_metadata: String,
    /// Asks for a quorum without new members.
    pub shrink_only: bool,
    /// This process has not been in a quorum yet and needs initial weights.
    pub init_sync: bool,
    /// The final sync: the group ends its run.
    pub final_sync: bool,
    /// Steps it discarded in a row.
    pub commit_failures: i64,
    /// Where its process group can be met in this round.
    pub handle: Handle,
    /// When its caller stops waiting.
    pub deadline: Duration,
}

/// Numbers the rounds of one group; an answer to an older round is late and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(pub u64);

/// One thing for the server to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatherEffect {
    /// All local ranks have asked, so none of them still votes on an earlier step: call
    /// [`crate::vote::CommitBarrier::begin`].
    RoundBegins(Round),
    /// Ask the lighthouse, and report what comes of it to [`Gather::answered`].
    Send {
        /// Give it back with the answer.
        round: Round,
        /// 1 for the first try of this round.
        attempt: u32,
        /// The group's request, for all its ranks.
        member: Member,
        /// The highest quorum id this group has seen.
        last_quorum_id: i64,
        /// By when the lighthouse must have answered: a little before the callers' deadline, so
        /// that its reason still reaches them.
        deadline: Duration,
    },
    /// Cancel the request of this round: no caller waits for it.
    Cancel(Round),
    /// Answer this caller.
    Answer {
        /// Whom.
        call_id: CallId,
        /// What that rank has to do in the quorum.
        assignment: Assignment,
    },
    /// Answer this caller with an error.
    Refuse {
        /// Whom.
        call_id: CallId,
        /// Why.
        refusal: GatherRefusal,
    },
}

/// The quorum requests of one group's local ranks, for one quorum after another.
#[derive(Debug)]
pub struct Gather {
    group: Group,
    /// The ranks' requests in this round, by rank.
    asks: BTreeMap<i64, Asked>,
    round: Round,
    /// The request to the lighthouse, once all ranks have asked.
    request: Option<LighthouseRequest>,
    last_quorum_id: i64,
    /// The checkpoint metadata in each rank's latest request.
    metadata: BTreeMap<i64, String>,
}

#[derive(Debug)]
struct Asked {
    call_id: CallId,
    ask: RankAsk,
}

#[derive(Debug)]
struct LighthouseRequest {
    /// Requests sent in this round.
    attempts: u32,
    /// Of these, those that the lighthouse answered with an error.
    failed: u32,
    /// When the next is sent; `None` while one waits for its answer.
    resend_at: Option<Duration>,
    /// By when the lighthouse must have answered.
    deadline: Duration,
    last_failure: Option<Failure>,
    /// The lighthouse could not be reached for a part of the time.
    was_away: bool,
}

impl Gather {
    /// A group of which no rank has asked yet.
    pub fn new(group: Group) -> Self {
        Self {
            group,
            asks: BTreeMap::new(),
            round: Round(0),
            request: None,
            last_quorum_id: 0,
            metadata: BTreeMap::new(),
        }
    }

    /// A local rank asks. It is answered by exactly one `Answer` or `Refuse` that names `call_id`,
    /// unless it leaves before.
    pub fn ask(&mut self, call_id: CallId, ask: RankAsk, now: Duration) -> Vec<GatherEffect> {
        let group_rank = ask.group_rank;
        let world_size = self.group.world_size;
        if group_rank < 0 || group_rank.unsigned_abs() >= world_size {
            let replica_id = self.group.replica_id.clone();
            let refusal = GatherRefusal::UnknownRank {
                replica_id,
                group_rank,
                world_size,
            };
            return vec![GatherEffect::Refuse { call_id, refusal }];
        }
        let mut effects = self.supersede(group_rank);
        self.metadata
            .insert(group_rank, ask.checkpoint_metadata.clone());
        self.asks.insert(group_rank, Asked { call_id, ask });
        if self.asks.len() as u64 == world_size {
            effects.extend(self.begin(now));
        }
        effects
    }

    /// The caller hung up: the round ends, its other callers are refused at once.
    pub fn leave(&mut self, call_id: CallId) -> Vec<GatherEffect> {
        match self.rank_of(call_id) {
            Some(group_rank) => self.end_round(group_rank),
            None => Vec::new(),
        }
    }

    /// The caller's deadline has passed: it is refused with what it waited for, and the round ends as
    /// by [`Gather::leave`].
    pub fn give_up(&mut self, call_id: CallId) -> Vec<GatherEffect> {
        let Some(group_rank) = self.rank_of(call_id) else {
            return Vec::new();
        };
        let request = self.request.as_ref();
        let refusal = GatherRefusal::Deadline {
            replica_id: self.group.replica_id.clone(),
            step: self.asks[&group_rank].ask.step,
            missing: self.missing(),
            last_failure: request.and_then(|request| request.last_failure.clone()),
        };
        let mut effects = vec![GatherEffect::Refuse { call_id, refusal }];
        effects.extend(self.end_round(group_rank));
        effects
    }

    /// The lighthouse's answer to the request of `round`. One to an earlier round is dropped.
    pub fn answered(
        &mut self,
        round: Round,
        answer: Result<Arc<Quorum>, Failure>,
        now: Duration,
    ) -> Vec<GatherEffect> {
        let in_flight = |request: &LighthouseRequest| request.resend_at.is_none();
        if round != self.round || !self.request.as_ref().is_some_and(in_flight) {
            return Vec::new();
        }
        match answer {
            Ok(quorum) => self.assign_all(&quorum),
            Err(failure) => self.retry_or_refuse(failure, now),
        }
    }

    /// Time has passed: a request that failed may be due again.
    pub fn tick(&mut self, now: Duration) -> Vec<GatherEffect> {
        if self.next_wake().is_some_and(|at| at <= now) {
            self.send()
        } else {
            Vec::new()
        }
    }

    /// When to call [`Gather::tick`].
    pub fn next_wake(&self) -> Option<Duration> {
        self.request.as_ref()?.resend_at
    }

    /// Where the state of this rank can be fetched, as its latest request said.
    pub fn checkpoint_metadata(&self, group_rank: i64) -> Option<&str> {
        self.metadata.get(&group_rank).map(String::as_str)
    }

    fn rank_of(&self, call_id: CallId) -> Option<i64> {
        let mut asks = self.asks.iter();
        asks.find(|(_, asked)| asked.call_id == call_id)
            .map(|(rank, _)| *rank)
    }

    fn missing(&self) -> Vec<i64> {
        let ranks = 0..self.group.world_size as i64;
        ranks.filter(|rank| !self.asks.contains_key(rank)).collect()
    }

    /// The rank asks again: its older request is refused, and ends the round if that was sent.
    fn supersede(&mut self, group_rank: i64) -> Vec<GatherEffect> {
        let Some(older) = self.asks.get(&group_rank) else {
            return Vec::new();
        };
        let mut effects = vec![GatherEffect::Refuse {
            call_id: older.call_id,
            refusal: GatherRefusal::Superseded { group_rank },
        }];
        if self.request.is_some() {
            effects.extend(self.end_round(group_rank));
        }
        self.asks.remove(&group_rank);
        effects
    }

    /// A rank stopped waiting: no rank gets a quorum in this round.
    fn end_round(&mut self, group_rank: i64) -> Vec<GatherEffect> {
        let Some(gone) = self.asks.remove(&group_rank) else {
            return Vec::new();
        };
        let replica_id = self.group.replica_id.clone();
        let step = gone.ask.step;
        let cancelled = self
            .request
            .is_some()
            .then_some(GatherEffect::Cancel(self.round));
        let refused = self.refuse_all(&GatherRefusal::RankLeft {
            replica_id,
            group_rank,
            step,
        });
        cancelled.into_iter().chain(refused).collect()
    }

    /// All ranks have asked.
    fn begin(&mut self, now: Duration) -> Vec<GatherEffect> {
        self.round.0 += 1;
        let deadlines = self.asks.values().map(|asked| asked.ask.deadline);
        let patience = deadlines.min().unwrap_or(now).saturating_sub(now);
        self.request = Some(LighthouseRequest {
            attempts: 0,
            failed: 0,
            resend_at: None,
            deadline: now + patience - (patience / 10).min(LONGEST_MARGIN),
            last_failure: None,
            was_away: false,
        });
        let mut effects = vec![GatherEffect::RoundBegins(self.round)];
        effects.extend(self.send());
        effects
    }

    fn send(&mut self) -> Vec<GatherEffect> {
        let member = self.member();
        let Some(request) = &mut self.request else {
            return Vec::new();
        };
        request.attempts += 1;
        request.resend_at = None;
        vec![GatherEffect::Send {
            round: self.round,
            attempt: request.attempts,
            member,
            last_quorum_id: self.last_quorum_id,
            deadline: request.deadline,
        }]
    }

    /// The group's request, for all its ranks.
    fn member(&self) -> Member {
        let asks = || self.asks.values().map(|asked| &asked.ask);
        Member {
            replica_id: self.group.replica_id.clone(),
            address: self.group.address.clone(),
            store_address: self.group.store_address.clone(),
            step: asks().map(|ask| ask.step).min().unwrap_or(0),
            world_size: self.group.world_size,
            shrink_only: asks().any(|ask| ask.shrink_only),
            data: String::new(),
            commit_failures: asks().map(|ask| ask.commit_failures).max().unwrap_or(0),
            init_sync: Some(asks().any(|ask| ask.init_sync)),
            final_sync: asks().any(|ask| ask.final_sync),
            handles: self.handles(),
            generation: Some(Generation::Own),
        }
    }

    /// The handles of the ranks, by rank; none if no rank says.
    fn handles(&self) -> Vec<Handle> {
        let asks = self.asks.values();
        let handles: Vec<_> = asks.map(|asked| asked.ask.handle.clone()).collect();
        let is_said = handles.iter().any(|handle| !handle.as_str().is_empty());
        if is_said { handles } else { Vec::new() }
    }

    /// Answers every rank with its assignment in the quorum.
    fn assign_all(&mut self, quorum: &Quorum) -> Vec<GatherEffect> {
        self.request = None;
        self.last_quorum_id = self.last_quorum_id.max(quorum.id);
        if let Some(apart) = self.steps_differ(quorum) {
            return self.refuse_all(&apart);
        }
        let replica_id = self.group.replica_id.as_str();
        let asks = std::mem::take(&mut self.asks).into_iter();
        asks.map(|(rank, Asked { call_id, ask })| {
            match assign(quorum, replica_id, rank, ask.init_sync) {
                Ok(assignment) => GatherEffect::Answer {
                    call_id,
                    assignment,
                },
                Err(error) => GatherEffect::Refuse {
                    call_id,
                    refusal: error.into(),
                },
            }
        })
        .collect()
    }

    /// Ranks at different steps hold different states. A heal makes them equal; without one, the
    /// rank that is ahead would offer its state as that of the rank behind.
    fn steps_differ(&self, quorum: &Quorum) -> Option<GatherRefusal> {
        let step = quorum.max_step();
        let own = quorum.member(self.group.replica_id.as_str())?;
        let steps = self
            .asks
            .iter()
            .map(|(rank, asked)| (*rank, asked.ask.step));
        let apart = own.step == step && steps.clone().any(|(_, at)| at != step);
        apart.then(|| GatherRefusal::StepsDiffer {
            replica_id: self.group.replica_id.clone(),
            ranks: steps.collect(),
        })
    }

    fn retry_or_refuse(&mut self, failure: Failure, now: Duration) -> Vec<GatherEffect> {
        let Some(request) = &mut self.request else {
            return Vec::new();
        };
        let failure = failure.after_absence(request.was_away);
        request.was_away |= failure.kind == FailureKind::Unreachable;
        request.failed += u32::from(failure.kind == FailureKind::Failed);
        let resend_at = now + pause_after(request.attempts);
        let again = match failure.kind {
            FailureKind::Unreachable => true,
            FailureKind::Failed => request.failed <= self.group.quorum_retries,
            FailureKind::Refused | FailureKind::StateLost | FailureKind::Deadline => false,
        };
        if again && resend_at < request.deadline {
            request.resend_at = Some(resend_at);
            request.last_failure = Some(failure);
            return Vec::new();
        }
        let attempts = request.attempts;
        let step = self.member().step;
        self.refuse_all(&GatherRefusal::Lighthouse {
            replica_id: self.group.replica_id.clone(),
            step,
            attempts,
            failure,
        })
    }

    /// Ends the round with the same error for all ranks that still wait.
    fn refuse_all(&mut self, refusal: &GatherRefusal) -> Vec<GatherEffect> {
        self.request = None;
        let asks = std::mem::take(&mut self.asks).into_values();
        asks.map(|asked| GatherEffect::Refuse {
            call_id: asked.call_id,
            refusal: refusal.clone(),
        })
        .collect()
    }
}

/// The pause after this many attempts.
fn pause_after(attempts: u32) -> Duration {
    let growth = 1.5_f64.powi(attempts.saturating_sub(1).min(16) as i32);
    FIRST_PAUSE.mul_f64(growth).min(LONGEST_PAUSE)
}
