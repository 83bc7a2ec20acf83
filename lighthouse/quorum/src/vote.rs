//! The commit barrier of one group: a step is committed only if every local rank says so.
//!
//! The votes of a barrier are answered together and alike, once all ranks have voted: yes if all
//! said yes. A barrier is about one step; it is *spoiled*, and answers at once, when
//! - a caller leaves: its vote is withdrawn, and nobody commits the step (it may be gone);
//! - votes of different steps meet: all get an error, since such ranks hold different states.
//!
//! A spoiled barrier answers ranks that vote later on that step alike, until the group's next
//! quorum round begins or a later step is voted on. So no vote outlives its caller or its step.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

use crate::member::{RankSteps, Ticket};

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

/// The barrier.
#[derive(Debug)]
pub struct Vote {
    world_size: u64,
    /// Votes that wait for the others, by rank; all on the same step.
    cast: BTreeMap<i64, Cast>,
    /// Set when this step can no longer be committed, for ranks that have not voted yet.
    spoiled: Option<Spoiled>,
}

#[derive(Clone, Copy, Debug)]
struct Cast {
    ticket: Ticket,
    step: i64,
    commit: bool,
}

#[derive(Clone, Debug)]
struct Spoiled {
    /// Votes on a later step begin a new barrier.
    step: i64,
    answer: Answer,
}

/// What all votes of a barrier are answered with.
type Answer = Result<Outcome, VoteRefusal>;

impl Vote {
    /// A barrier over `world_size` ranks.
    pub fn new(world_size: u64) -> Self {
        Self {
            world_size,
            cast: BTreeMap::new(),
            spoiled: None,
        }
    }

    /// The next quorum round of the group begins: what is left of the last barrier is void.
    pub fn begin(&mut self) -> Vec<VoteEffect> {
        self.spoiled = None;
        self.end(&Ok(Outcome::RoundOver))
    }

    /// A rank votes. It is answered by exactly one effect that names `ticket`, unless it leaves before.
    pub fn vote(&mut self, ticket: Ticket, ballot: Ballot) -> Vec<VoteEffect> {
        let Ballot {
            group_rank,
            step,
            commit,
        } = ballot;
        let world_size = self.world_size;
        if group_rank < 0 || group_rank.unsigned_abs() >= world_size {
            let unknown = VoteRefusal::UnknownRank {
                group_rank,
                world_size,
            };
            return vec![effect(ticket, Err(unknown))];
        }
        let mut effects = self.supersede(group_rank);
        if self
            .spoiled
            .as_ref()
            .is_some_and(|spoiled| spoiled.step < step)
        {
            self.spoiled = None;
        }
        if let Some(spoiled) = &self.spoiled {
            effects.push(effect(ticket, spoiled.answer.clone()));
            return effects;
        }
        let cast = Cast {
            ticket,
            step,
            commit,
        };
        self.cast.insert(group_rank, cast);
        effects.extend(self.close());
        effects
    }

    /// The caller hung up: its vote is withdrawn, and nobody commits this step.
    pub fn leave(&mut self, ticket: Ticket) -> Vec<VoteEffect> {
        match self.rank_of(ticket) {
            Some(rank) => self.walk_out(rank),
            None => Vec::new(),
        }
    }

    /// The caller's deadline has passed: as [`Vote::leave`], and it is told who was missing.
    pub fn give_up(&mut self, ticket: Ticket) -> Vec<VoteEffect> {
        let Some(group_rank) = self.rank_of(ticket) else {
            return Vec::new();
        };
        let deadline = VoteRefusal::Deadline {
            group_rank,
            step: self.cast[&group_rank].step,
            missing: self.missing(),
        };
        let mut effects = vec![effect(ticket, Err(deadline))];
        effects.extend(self.walk_out(group_rank));
        effects
    }

    fn rank_of(&self, ticket: Ticket) -> Option<i64> {
        let mut cast = self.cast.iter();
        cast.find(|(_, cast)| cast.ticket == ticket)
            .map(|(rank, _)| *rank)
    }

    fn missing(&self) -> Vec<i64> {
        let ranks = 0..self.world_size as i64;
        ranks.filter(|rank| !self.cast.contains_key(rank)).collect()
    }

    fn supersede(&mut self, group_rank: i64) -> Vec<VoteEffect> {
        let older = self.cast.remove(&group_rank).into_iter();
        older
            .map(|cast| effect(cast.ticket, Err(VoteRefusal::Superseded { group_rank })))
            .collect()
    }

    fn walk_out(&mut self, rank: i64) -> Vec<VoteEffect> {
        let step = self.cast.remove(&rank).map_or(0, |cast| cast.step);
        self.spoil(step, Ok(Outcome::RankLeft(rank)))
    }

    /// Ends the barrier, if it is full or can never be right.
    fn close(&mut self) -> Vec<VoteEffect> {
        let steps = || self.cast.values().map(|cast| cast.step);
        if let (Some(first), Some(last)) = (steps().min(), steps().max())
            && first != last
        {
            let votes = self.cast.iter().map(|(rank, cast)| (*rank, cast.step));
            let votes = votes.collect();
            return self.spoil(last, Err(VoteRefusal::StepsDiffer { votes }));
        }
        if (self.cast.len() as u64) < self.world_size {
            return Vec::new();
        }
        let no = self.cast.iter().filter(|(_, cast)| !cast.commit);
        let no: Vec<i64> = no.map(|(rank, _)| *rank).collect();
        self.end(&Ok(if no.is_empty() {
            Outcome::Committed
        } else {
            Outcome::VotedDown(no)
        }))
    }

    fn spoil(&mut self, step: i64, answer: Answer) -> Vec<VoteEffect> {
        let effects = self.end(&answer);
        self.spoiled = Some(Spoiled { step, answer });
        effects
    }

    /// Gives all votes that wait the same answer.
    fn end(&mut self, answer: &Answer) -> Vec<VoteEffect> {
        let cast = std::mem::take(&mut self.cast).into_values();
        cast.map(|cast| effect(cast.ticket, answer.clone()))
            .collect()
    }
}

fn effect(ticket: Ticket, answer: Answer) -> VoteEffect {
    match answer {
        Ok(outcome) => VoteEffect::Answer { ticket, outcome },
        Err(refusal) => VoteEffect::Refuse { ticket, refusal },
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Committed => f.write_str("committed: every rank voted yes"),
            Self::VotedDown(ranks) => write!(f, "discarded: group ranks {ranks:?} voted no"),
            Self::RankLeft(rank) => {
                write!(f, "discarded: group rank {rank} left before all had voted")
            }
            Self::RoundOver => f.write_str("discarded: the next quorum round has begun"),
        }
    }
}
