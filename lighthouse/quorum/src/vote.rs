//! The commit barrier of one group: a step is committed only if every local rank says so.

use thiserror::Error;

use crate::member::Ticket;

/// What one rank votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ballot {
    /// Which rank.
    pub group_rank: i64,
    /// The step that it wants to commit.
    pub step: i64,
    /// Its vote.
    pub commit: bool,
}

/// One thing for the shell to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VoteEffect {
    /// Answer this caller: [`Outcome::commits`].
    Answer {
        /// Whom.
        ticket: Ticket,
        /// What was decided and why.
        outcome: Outcome,
    },
    /// Answer this caller with an error.
    Refuse {
        /// Whom.
        ticket: Ticket,
        /// Why.
        refusal: VoteRefusal,
    },
}

/// How a step ended for the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every rank voted yes.
    Committed,
    /// These ranks voted no.
    VotedDown(Vec<i64>),
    /// This rank stopped waiting for the others.
    RankLeft(i64),
    /// All ranks asked for the next quorum: this vote came too late.
    RoundOver,
}

impl Outcome {
    /// The answer on the wire.
    pub fn commits(&self) -> bool {
        *self == Outcome::Committed
    }
}

/// Why a vote cannot count.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VoteRefusal {
    /// There is no such rank.
    #[error("group rank {group_rank} is not one of the {world_size} ranks of this group")]
    UnknownRank {
        /// What was said.
        group_rank: i64,
        /// How many ranks there are.
        world_size: u64,
    },
    /// The same rank voted again.
    #[error("group rank {group_rank} has voted again: this older vote is superseded")]
    Superseded {
        /// Which.
        group_rank: i64,
    },
    /// Ranks of one group are at different steps.
    #[error("steps differ")]
    StepsDiffer {
        /// Rank and step of each vote that is in, by rank.
        votes: Vec<(i64, i64)>,
    },
    /// The caller's deadline passed.
    #[error("deadline")]
    Deadline {
        /// Who voted.
        group_rank: i64,
        /// On which step.
        step: i64,
        /// Ranks that have not voted.
        missing: Vec<i64>,
    },
}

/// The barrier.
#[derive(Debug)]
pub struct Vote {}

impl Vote {
    /// A barrier over `world_size` ranks.
    pub fn new(world_size: u64) -> Self {
        todo!("{world_size}")
    }

    /// The next quorum round of the group begins: what is left of the last barrier is void.
    pub fn begin(&mut self) -> Vec<VoteEffect> {
        todo!()
    }

    /// A rank votes. It is answered by exactly one effect that names `ticket`, unless it leaves before.
    pub fn vote(&mut self, ticket: Ticket, ballot: Ballot) -> Vec<VoteEffect> {
        todo!("{ticket:?} {ballot:?}")
    }

    /// The caller hung up: its vote is withdrawn, and nobody commits this step.
    pub fn leave(&mut self, ticket: Ticket) -> Vec<VoteEffect> {
        todo!("{ticket:?}")
    }

    /// The caller's deadline has passed: as [`Vote::leave`], and it is told who was missing.
    pub fn give_up(&mut self, ticket: Ticket) -> Vec<VoteEffect> {
        todo!("{ticket:?}")
    }
}
