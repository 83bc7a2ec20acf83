//! The commit barrier of one group: a step is committed only if every local rank votes for it.
//!
//! Once all ranks have voted, all get the same answer: yes if all voted yes. A barrier is about one
//! step. It is *aborted*, and answers at once, when
//! - a caller leaves: its vote is withdrawn, and no rank commits the step, since that rank may be dead;
//! - votes for different steps meet: all get an error, since such ranks hold different states.
//!
//! A rank that votes later on an aborted step gets the same answer, until the group's next quorum
//! round begins or a later step is voted on. So no vote outlives its caller or its step.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

use crate::member::{CallId, RankSteps};

/// The vote of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankVote {
    /// The rank that votes.
    pub group_rank: i64,
    /// The step that it wants to commit.
    pub step: i64,
    /// Its vote.
    pub commit: bool,
}

/// One thing for the server to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VoteEffect {
    /// Answer this caller: [`Outcome::commits`].
    Answer {
        /// Whom.
        call_id: CallId,
        /// The decision and its reason.
        outcome: Outcome,
    },
    /// Answer this caller with an error.
    Refuse {
        /// Whom.
        call_id: CallId,
        /// Why.
        refusal: VoteRefusal,
    },
}

/// How a vote on a step ended for the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every rank voted yes.
    Committed,
    /// These ranks voted against the step.
    VotedDown(Vec<i64>),
    /// This rank stopped waiting for the others.
    RankLeft(i64),
    /// All ranks have asked for the next quorum: the vote came too late.
    RoundOver,
}

impl Outcome {
    /// Whether the step is committed: the answer on the wire.
    pub fn commits(&self) -> bool {
        *self == Outcome::Committed
    }
}

/// Why a vote is not counted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VoteRefusal {
    /// The group has no such rank.
    #[error("group rank {group_rank} is not one of the {world_size} ranks of this group")]
    UnknownRank {
        /// The rank in the request.
        group_rank: i64,
        /// How many ranks there are.
        world_size: u64,
    },
    /// The same rank voted again.
    #[error("group rank {group_rank} has voted again: this older vote is superseded")]
    Superseded {
        /// The rank that voted twice.
        group_rank: i64,
    },
    /// Ranks of one group are at different steps.
    #[error(
        "ranks of this group vote on different steps ({}): they hold different states, so restart \
         the group, and it heals from the others",
        RankSteps(votes)
    )]
    StepsDiffer {
        /// Rank and step of each vote that is in, by rank.
        votes: Vec<(i64, i64)>,
    },
    /// The caller's deadline passed.
    #[error(
        "group rank {group_rank} voted at step {step}, but group ranks {missing:?} did not before \
         its deadline: the step is discarded; look at those ranks' logs"
    )]
    Deadline {
        /// Who voted.
        group_rank: i64,
        /// On which step.
        step: i64,
        /// Ranks that have not voted.
        missing: Vec<i64>,
    },
}

/// The commit barrier of one group.
#[derive(Debug)]
pub struct CommitBarrier {
    world_size: u64,
    /// Votes that wait for those of the other ranks, by rank; all on the same step.
    votes: BTreeMap<i64, PendingVote>,
    /// Set when a step can no longer be committed: the answer for ranks that vote on it later.
    aborted: Option<AbortedStep>,
}

#[derive(Clone, Copy, Debug)]
struct PendingVote {
    call_id: CallId,
    step: i64,
    commit: bool,
}

#[derive(Clone, Debug)]
struct AbortedStep {
    /// Votes on a later step start a new barrier.
    step: i64,
    answer: Answer,
}

/// The answer to all votes of a barrier.
type Answer = Result<Outcome, VoteRefusal>;

impl CommitBarrier {
    /// A barrier for a group of `world_size` ranks.
    pub fn new(world_size: u64) -> Self {
        Self {
            world_size,
            votes: BTreeMap::new(),
            aborted: None,
        }
    }

    /// The next quorum round of the group begins: votes that still wait are answered with no.
    pub fn begin(&mut self) -> Vec<VoteEffect> {
        self.aborted = None;
        self.end(&Ok(Outcome::RoundOver))
    }

    /// A rank votes. It is answered by exactly one effect that names `call_id`, unless it leaves before.
    pub fn vote(&mut self, call_id: CallId, vote: RankVote) -> Vec<VoteEffect> {
        let RankVote {
            group_rank,
            step,
            commit,
        } = vote;
        let world_size = self.world_size;
        if group_rank < 0 || group_rank.unsigned_abs() >= world_size {
            let unknown = VoteRefusal::UnknownRank {
                group_rank,
                world_size,
            };
            return vec![effect(call_id, Err(unknown))];
        }
        let mut effects = self.supersede(group_rank);
        self.aborted.take_if(|aborted| aborted.step < step);
        if let Some(aborted) = &self.aborted {
            effects.push(effect(call_id, aborted.answer.clone()));
            return effects;
        }
        let vote = PendingVote {
            call_id,
            step,
            commit,
        };
        self.votes.insert(group_rank, vote);
        effects.extend(self.close());
        effects
    }

    /// The caller hung up: its vote is withdrawn, and no rank commits this step.
    pub fn leave(&mut self, call_id: CallId) -> Vec<VoteEffect> {
        match self.rank_of(call_id) {
            Some(rank) => self.withdraw(rank),
            None => Vec::new(),
        }
    }

    /// The caller's deadline has passed: as [`CommitBarrier::leave`], and its error names the missing ranks.
    pub fn give_up(&mut self, call_id: CallId) -> Vec<VoteEffect> {
        let Some(group_rank) = self.rank_of(call_id) else {
            return Vec::new();
        };
        let deadline = VoteRefusal::Deadline {
            group_rank,
            step: self.votes[&group_rank].step,
            missing: self.missing(),
        };
        let mut effects = vec![effect(call_id, Err(deadline))];
        effects.extend(self.withdraw(group_rank));
        effects
    }

    fn rank_of(&self, call_id: CallId) -> Option<i64> {
        let mut votes = self.votes.iter();
        votes
            .find(|(_, vote)| vote.call_id == call_id)
            .map(|(rank, _)| *rank)
    }

    fn missing(&self) -> Vec<i64> {
        let ranks = 0..self.world_size as i64;
        ranks
            .filter(|rank| !self.votes.contains_key(rank))
            .collect()
    }

    fn supersede(&mut self, group_rank: i64) -> Vec<VoteEffect> {
        let older = self.votes.remove(&group_rank).into_iter();
        older
            .map(|vote| effect(vote.call_id, Err(VoteRefusal::Superseded { group_rank })))
            .collect()
    }

    fn withdraw(&mut self, rank: i64) -> Vec<VoteEffect> {
        let step = self.votes.remove(&rank).map_or(0, |vote| vote.step);
        self.abort(step, Ok(Outcome::RankLeft(rank)))
    }

    /// Answers all votes if every rank has voted, or if their steps differ.
    fn close(&mut self) -> Vec<VoteEffect> {
        let steps = || self.votes.values().map(|vote| vote.step);
        if let (Some(first), Some(last)) = (steps().min(), steps().max())
            && first != last
        {
            let votes = self
                .votes
                .iter()
                .map(|(rank, vote)| (*rank, vote.step))
                .collect();
            return self.abort(last, Err(VoteRefusal::StepsDiffer { votes }));
        }
        if (self.votes.len() as u64) < self.world_size {
            return Vec::new();
        }
        let no = self.votes.iter().filter(|(_, vote)| !vote.commit);
        let no: Vec<i64> = no.map(|(rank, _)| *rank).collect();
        self.end(&Ok(if no.is_empty() {
            Outcome::Committed
        } else {
            Outcome::VotedDown(no)
        }))
    }

    fn abort(&mut self, step: i64, answer: Answer) -> Vec<VoteEffect> {
        let effects = self.end(&answer);
        self.aborted = Some(AbortedStep { step, answer });
        effects
    }

    /// Gives all waiting votes the same answer.
    fn end(&mut self, answer: &Answer) -> Vec<VoteEffect> {
        let votes = std::mem::take(&mut self.votes).into_values();
        votes
            .map(|vote| effect(vote.call_id, answer.clone()))
            .collect()
    }
}

fn effect(call_id: CallId, answer: Answer) -> VoteEffect {
    match answer {
        Ok(outcome) => VoteEffect::Answer { call_id, outcome },
        Err(refusal) => VoteEffect::Refuse { call_id, refusal },
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Committed => f.write_str("committed: every rank voted yes"),
            Self::VotedDown(ranks) => write!(f, "discarded: group ranks {ranks:?} voted no"),
            Self::RankLeft(rank) => {
                write!(
                    f,
                    "discarded: group rank {rank} stopped waiting before all had voted"
                )
            }
            Self::RoundOver => f.write_str("discarded: the next quorum round has begun"),
        }
    }
}
