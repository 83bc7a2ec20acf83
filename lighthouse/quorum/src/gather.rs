//! A group asks as one: when all its local ranks have asked, one request goes to the lighthouse.
//!
//! - The group is as far as its slowest rank: the request has the *lowest* step. It asks
//!   `shrink_only`, `init_sync` and with as many discarded steps as any rank does.
//! - Its deadline is that of the least patient caller, and so is that of every retry.
//! - Ranks at different steps become equal by healing; if nobody is ahead of the slowest, all are
//!   refused.
//! - A caller that leaves breaks the round: the request is cancelled, all other callers are refused
//!   at once, and a late answer is dropped.
//! - A request that failed for good is answered to all callers at once, with its reason.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::assign::{Assignment, assign};
pub use crate::gather_error::{Failure, FailureKind, GatherRefusal};
use crate::member::{Member, Quorum, ReplicaId, Ticket};

/// The first pause before a request is sent again; each is half as long again as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How much sooner than its callers give up the lighthouse must answer: a tenth of their time, at
/// most this.
const LONGEST_MARGIN: Duration = Duration::from_millis(100);

/// The group that is gathered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name in the quorum.
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

/// What one local rank asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankAsk {
    /// Which rank.
    pub group_rank: i64,
    /// The last step it committed.
    pub step: i64,
    /// Where its state can be fetched; opaque.
    pub checkpoint_metadata: String,
    /// Asks that no new member is taken in.
    pub shrink_only: bool,
    /// Has not been in a quorum yet and wants the initial synchronisation.
    pub init_sync: bool,
    /// Ends its run.
    pub settling: bool,
    /// Steps it discarded in a row.
    pub commit_failures: i64,
    /// When it will no longer wait.
    pub deadline: Duration,
}

/// Numbers the rounds of one group; an answer to an older round is late and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(pub u64);

/// One thing for the shell to carry out, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatherEffect {
    /// All local ranks have asked, so none of them still votes on an earlier step: call
    /// [`crate::vote::Vote::begin`].
    RoundBegins(Round),
    /// Ask the lighthouse, and report what comes of it to [`Gather::answered`].
    Send {
        /// Give it back with the answer.
        round: Round,
        /// 1 for the first try of this round.
        attempt: u32,
        /// The group, speaking for all its ranks.
        member: Member,
        /// The highest quorum id this group has seen.
        last_quorum_id: i64,
        /// By when the lighthouse must have answered: a little before the callers' deadline, so
        /// that its reason still reaches them.
        deadline: Duration,
    },
    /// Abandon the request of this round: nobody waits for it.
    Cancel(Round),
    /// Answer this caller.
    Answer {
        /// Whom.
        ticket: Ticket,
        /// What its rank is told.
        assignment: Assignment,
    },
    /// Answer this caller with an error.
    Refuse {
        /// Whom.
        ticket: Ticket,
        /// Why.
        refusal: GatherRefusal,
    },
}

/// The local ranks of one group, on their way to one quorum after another.
#[derive(Debug)]
pub struct Gather {
    group: Group,
    /// Requests of this round, by rank.
    asks: BTreeMap<i64, Asked>,
    round: Round,
    /// The request to the lighthouse, once all ranks have asked.
    flight: Option<Flight>,
    last_quorum_id: i64,
    /// What each rank said when it last asked.
    metadata: BTreeMap<i64, String>,
}

#[derive(Debug)]
struct Asked {
    ticket: Ticket,
    ask: RankAsk,
}

#[derive(Debug)]
struct Flight {
    /// Requests sent in this round.
    attempts: u32,
    /// Of these, those that the lighthouse failed.
    failed: u32,
    /// When the next is sent; `None`: one is on its way.
    resend_at: Option<Duration>,
    /// By when the lighthouse must have answered.
    deadline: Duration,
    last_failure: Option<Failure>,
    /// The lighthouse was not reached for a part of the time.
    was_away: bool,
}

impl Gather {
    /// A group of which no rank has asked yet.
    pub fn new(group: Group) -> Self {
        Self {
            group,
            asks: BTreeMap::new(),
            round: Round(0),
            flight: None,
            last_quorum_id: 0,
            metadata: BTreeMap::new(),
        }
    }

    /// A local rank asks. It is answered by exactly one `Answer` or `Refuse` that names `ticket`,
    /// unless it leaves before.
    pub fn ask(&mut self, ticket: Ticket, ask: RankAsk, now: Duration) -> Vec<GatherEffect> {
        let group_rank = ask.group_rank;
        let world_size = self.group.world_size;
        if group_rank < 0 || group_rank.unsigned_abs() >= world_size {
            let replica_id = self.group.replica_id.clone();
            let refusal = GatherRefusal::UnknownRank {
                replica_id,
                group_rank,
                world_size,
            };
            return vec![GatherEffect::Refuse { ticket, refusal }];
        }
        let mut effects = self.supersede(group_rank);
        self.metadata
            .insert(group_rank, ask.checkpoint_metadata.clone());
        self.asks.insert(group_rank, Asked { ticket, ask });
        if self.asks.len() as u64 == world_size {
            effects.extend(self.begin(now));
        }
        effects
    }

    /// The caller hung up: the round is broken, its other callers are refused at once.
    pub fn leave(&mut self, ticket: Ticket) -> Vec<GatherEffect> {
        match self.rank_of(ticket) {
            Some(group_rank) => self.walk_out(group_rank),
            None => Vec::new(),
        }
    }

    /// The caller's deadline has passed: it is refused with what it waited for, and the round is
    /// broken as by [`Gather::leave`].
    pub fn give_up(&mut self, ticket: Ticket) -> Vec<GatherEffect> {
        let Some(group_rank) = self.rank_of(ticket) else {
            return Vec::new();
        };
        let flight = self.flight.as_ref();
        let refusal = GatherRefusal::Deadline {
            replica_id: self.group.replica_id.clone(),
            step: self.asks[&group_rank].ask.step,
            missing: self.missing(),
            last_failure: flight.and_then(|flight| flight.last_failure.clone()),
        };
        let mut effects = vec![GatherEffect::Refuse { ticket, refusal }];
        effects.extend(self.walk_out(group_rank));
        effects
    }

    /// The lighthouse's answer to the request of `round`. One to an earlier round is dropped.
    pub fn answered(
        &mut self,
        round: Round,
        answer: Result<Arc<Quorum>, Failure>,
        now: Duration,
    ) -> Vec<GatherEffect> {
        let in_flight = |flight: &Flight| flight.resend_at.is_none();
        if round != self.round || !self.flight.as_ref().is_some_and(in_flight) {
            return Vec::new();
        }
        match answer {
            Ok(quorum) => self.deal(&quorum),
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

    /// When [`Gather::tick`] has something to do.
    pub fn next_wake(&self) -> Option<Duration> {
        self.flight.as_ref()?.resend_at
    }

    /// Where the state of this rank can be fetched, as it said when it last asked.
    pub fn checkpoint_metadata(&self, group_rank: i64) -> Option<&str> {
        self.metadata.get(&group_rank).map(String::as_str)
    }

    fn rank_of(&self, ticket: Ticket) -> Option<i64> {
        let mut asks = self.asks.iter();
        asks.find(|(_, asked)| asked.ticket == ticket)
            .map(|(rank, _)| *rank)
    }

    fn missing(&self) -> Vec<i64> {
        let ranks = 0..self.group.world_size as i64;
        ranks.filter(|rank| !self.asks.contains_key(rank)).collect()
    }

    /// The rank asks again: its older request makes room, and breaks the round if that was sent.
    fn supersede(&mut self, group_rank: i64) -> Vec<GatherEffect> {
        let Some(older) = self.asks.get(&group_rank) else {
            return Vec::new();
        };
        let mut effects = vec![GatherEffect::Refuse {
            ticket: older.ticket,
            refusal: GatherRefusal::Superseded { group_rank },
        }];
        if self.flight.is_some() {
            effects.extend(self.walk_out(group_rank));
        }
        self.asks.remove(&group_rank);
        effects
    }

    /// A rank is gone: nobody else gets a quorum in this round.
    fn walk_out(&mut self, group_rank: i64) -> Vec<GatherEffect> {
        let Some(gone) = self.asks.remove(&group_rank) else {
            return Vec::new();
        };
        let replica_id = self.group.replica_id.clone();
        let step = gone.ask.step;
        let cancelled = self
            .flight
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
        self.flight = Some(Flight {
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
        let Some(flight) = &mut self.flight else {
            return Vec::new();
        };
        flight.attempts += 1;
        flight.resend_at = None;
        vec![GatherEffect::Send {
            round: self.round,
            attempt: flight.attempts,
            member,
            last_quorum_id: self.last_quorum_id,
            deadline: flight.deadline,
        }]
    }

    /// The group, speaking for all its ranks.
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
            settling: asks().any(|ask| ask.settling),
        }
    }

    /// Tells every rank its part in the quorum.
    fn deal(&mut self, quorum: &Quorum) -> Vec<GatherEffect> {
        self.flight = None;
        self.last_quorum_id = self.last_quorum_id.max(quorum.id);
        if let Some(apart) = self.ranks_apart(quorum) {
            return self.refuse_all(&apart);
        }
        let replica_id = self.group.replica_id.as_str();
        let asks = std::mem::take(&mut self.asks).into_iter();
        asks.map(|(rank, Asked { ticket, ask })| {
            match assign(quorum, replica_id, rank, ask.init_sync) {
                Ok(assignment) => GatherEffect::Answer { ticket, assignment },
                Err(stranger) => GatherEffect::Refuse {
                    ticket,
                    refusal: stranger.into(),
                },
            }
        })
        .collect()
    }

    /// Ranks at different steps hold different states. A heal makes them equal; without one, the
    /// faster would give its state away as that of the slower.
    fn ranks_apart(&self, quorum: &Quorum) -> Option<GatherRefusal> {
        let step = quorum.max_step();
        let own = quorum.member(self.group.replica_id.as_str())?;
        let steps = self
            .asks
            .iter()
            .map(|(rank, asked)| (*rank, asked.ask.step));
        let apart = own.step == step && steps.clone().any(|(_, at)| at != step);
        apart.then(|| GatherRefusal::RanksApart {
            replica_id: self.group.replica_id.clone(),
            ranks: steps.collect(),
        })
    }

    fn retry_or_refuse(&mut self, failure: Failure, now: Duration) -> Vec<GatherEffect> {
        let Some(flight) = &mut self.flight else {
            return Vec::new();
        };
        let failure = failure.after_absence(flight.was_away);
        flight.was_away |= failure.kind == FailureKind::Unreachable;
        flight.failed += u32::from(failure.kind == FailureKind::Failed);
        let resend_at = now + pause_after(flight.attempts);
        let again = match failure.kind {
            FailureKind::Unreachable => true,
            FailureKind::Failed => flight.failed <= self.group.quorum_retries,
            FailureKind::Refused | FailureKind::StateLost | FailureKind::Deadline => false,
        };
        if again && resend_at < flight.deadline {
            flight.resend_at = Some(resend_at);
            flight.last_failure = Some(failure);
            return Vec::new();
        }
        let attempts = flight.attempts;
        let step = self.member().step;
        self.refuse_all(&GatherRefusal::Lighthouse {
            replica_id: self.group.replica_id.clone(),
            step,
            attempts,
            failure,
        })
    }

    /// Ends the round with the same error for all who are still in it.
    fn refuse_all(&mut self, refusal: &GatherRefusal) -> Vec<GatherEffect> {
        self.flight = None;
        let asks = std::mem::take(&mut self.asks).into_values();
        asks.map(|asked| GatherEffect::Refuse {
            ticket: asked.ticket,
            refusal: refusal.clone(),
        })
        .collect()
    }
}

/// How long to wait after so many attempts.
fn pause_after(attempts: u32) -> Duration {
    let growth = 1.5_f64.powi(attempts.saturating_sub(1).min(16) as i32);
    FIRST_PAUSE.mul_f64(growth).min(LONGEST_PAUSE)
}
