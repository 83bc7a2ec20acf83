//! A group asks as one: when all its local ranks have asked, one request goes to the lighthouse.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::assign::{Assignment, NotInQuorum};
use crate::member::{Member, Quorum, ReplicaId, Ticket};

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

/// Why a rank gets an error instead of a quorum.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GatherRefusal {
    /// There is no such rank.
    #[error("group rank {group_rank} of replica {replica_id} is not one of its {world_size} ranks")]
    UnknownRank {
        /// The group.
        replica_id: ReplicaId,
        /// What was asked for.
        group_rank: i64,
        /// How many ranks there are.
        world_size: u64,
    },
    /// The same rank asked again.
    #[error("group rank {group_rank} has asked again: this older request is superseded")]
    Superseded {
        /// Which.
        group_rank: i64,
    },
    /// Another rank of the group stopped waiting, so the group cannot ask as one.
    #[error("group rank {group_rank} of replica {replica_id} left")]
    RankLeft {
        /// The group.
        replica_id: ReplicaId,
        /// Which rank left.
        group_rank: i64,
        /// Where it was.
        step: i64,
    },
    /// The caller's deadline passed.
    #[error("deadline")]
    Deadline {
        /// The group.
        replica_id: ReplicaId,
        /// Where the caller is.
        step: i64,
        /// Local ranks that have not asked; empty: the lighthouse has not answered.
        missing: Vec<i64>,
        /// What went wrong with the last try at the lighthouse, if anything did.
        last_failure: Option<Failure>,
    },
    /// The lighthouse did not give a quorum.
    #[error("lighthouse")]
    Lighthouse {
        /// The group.
        replica_id: ReplicaId,
        /// Where the group is.
        step: i64,
        /// How often it was asked.
        attempts: u32,
        /// What it said last.
        failure: Failure,
    },
    /// The lighthouse answered with a quorum of others.
    #[error(transparent)]
    NotInQuorum(#[from] NotInQuorum),
}

/// Why a request to the lighthouse brought no quorum.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// What the lighthouse or the network said.
    pub message: String,
}

/// Kinds of failure, by what may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// It was not reached, or the connection broke: sent again until the callers' deadline.
    Unreachable,
    /// It answered with an error that may pass: sent again up to `quorum_retries` times.
    Failed,
    /// It refused the request, and would again.
    Refused,
    /// It refused because the state to heal to is lost.
    StateLost,
    /// The deadline passed there; the message says what was waited for.
    Deadline,
}

/// The local ranks of one group, on their way to one quorum after another.
#[derive(Debug)]
pub struct Gather {}

impl Gather {
    /// A group of which no rank has asked yet.
    pub fn new(group: Group) -> Self {
        todo!("{group:?}")
    }

    /// A local rank asks. It is answered by exactly one `Answer` or `Refuse` that names `ticket`,
    /// unless it leaves before.
    pub fn ask(&mut self, ticket: Ticket, ask: RankAsk, now: Duration) -> Vec<GatherEffect> {
        todo!("{ticket:?} {ask:?} {now:?}")
    }

    /// The caller hung up: the round is broken, its other callers are refused at once.
    pub fn leave(&mut self, ticket: Ticket, now: Duration) -> Vec<GatherEffect> {
        todo!("{ticket:?} {now:?}")
    }

    /// The caller's deadline has passed: it is refused with what it waited for, and the round is
    /// broken as by [`Gather::leave`].
    pub fn give_up(&mut self, ticket: Ticket, now: Duration) -> Vec<GatherEffect> {
        todo!("{ticket:?} {now:?}")
    }

    /// The lighthouse's answer to the request of `round`.
    pub fn answered(
        &mut self,
        round: Round,
        answer: Result<Arc<Quorum>, Failure>,
        now: Duration,
    ) -> Vec<GatherEffect> {
        todo!("{round:?} {answer:?} {now:?}")
    }

    /// Time has passed: a request that failed may be due again.
    pub fn tick(&mut self, now: Duration) -> Vec<GatherEffect> {
        todo!("{now:?}")
    }

    /// When [`Gather::tick`] has something to do.
    pub fn next_wake(&self) -> Option<Duration> {
        todo!()
    }

    /// Where the state of this rank can be fetched, as it said when it last asked.
    pub fn checkpoint_metadata(&self, group_rank: i64) -> Option<&str> {
        todo!("{group_rank}")
    }
}
