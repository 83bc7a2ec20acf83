//! Errors that a rank gets instead of a quorum, and errors of requests to the lighthouse.

use thiserror::Error;

use crate::assign::NotInQuorum;
use crate::member::{RankSteps, ReplicaId};

/// Why a rank gets an error instead of a quorum.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GatherRefusal {
    /// The group has no such rank.
    #[error("group rank {group_rank} of replica {replica_id} is not one of its {world_size} ranks")]
    UnknownRank {
        /// The group.
        replica_id: ReplicaId,
        /// The rank in the request.
        group_rank: i64,
        /// How many ranks there are.
        world_size: u64,
    },
    /// The same rank asked again.
    #[error("group rank {group_rank} has asked again: this older request is superseded")]
    Superseded {
        /// The rank that asked twice.
        group_rank: i64,
    },
    /// Another rank of the group stopped waiting, and the group needs the requests of all.
    #[error(
        "group rank {group_rank} of replica {replica_id} stopped waiting for a quorum at step {step}, \
         and the group needs the requests of all its ranks: look at that rank's log, and ask again"
    )]
    RankLeft {
        /// The group.
        replica_id: ReplicaId,
        /// The rank that stopped waiting.
        group_rank: i64,
        /// The step of that rank.
        step: i64,
    },
    /// The caller's deadline passed.
    #[error(
        "no quorum for replica {replica_id} at step {step} before the deadline: {}",
        hung_on(missing, last_failure)
    )]
    Deadline {
        /// The group.
        replica_id: ReplicaId,
        /// The step of the caller.
        step: i64,
        /// Local ranks that have not asked; empty: the lighthouse has not answered.
        missing: Vec<i64>,
        /// What went wrong with the last try at the lighthouse, if anything did.
        last_failure: Option<Failure>,
    },
    /// The lighthouse did not give a quorum.
    #[error(
        "no quorum for replica {replica_id} at step {step} (requests to the lighthouse: {attempts}): {failure}"
    )]
    Lighthouse {
        /// The group.
        replica_id: ReplicaId,
        /// The step of the group.
        step: i64,
        /// The number of requests.
        attempts: u32,
        /// Its last answer.
        failure: Failure,
    },
    /// Ranks of the group are at different steps, and no other group is ahead of the slowest: there
    /// is no donor to heal from.
    #[error(
        "the ranks of replica {replica_id} are at different steps ({}), and no other group is \
         ahead of the slowest: restart the group from a checkpoint",
        RankSteps(ranks)
    )]
    StepsDiffer {
        /// The group.
        replica_id: ReplicaId,
        /// Rank and step of each, by rank.
        ranks: Vec<(i64, i64)>,
    },
    /// The lighthouse answered with a quorum of others.
    #[error(transparent)]
    NotInQuorum(#[from] NotInQuorum),
}

/// Why a request to the lighthouse brought no quorum.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of failure.
    pub kind: FailureKind,
    /// The text from the lighthouse or the network.
    pub message: String,
}

impl Failure {
    /// After an absence of the lighthouse, a missed deadline says nothing about the missing replicas:
    /// they had no time to reach it again. So the request counts as one that did not reach it.
    pub(crate) fn after_absence(self, was_away: bool) -> Self {
        match self.kind {
            FailureKind::Deadline if was_away => Self {
                kind: FailureKind::Unreachable,
                message: format!(
                    "the lighthouse could not be reached until just now; {}",
                    self.message
                ),
            },
            _ => self,
        }
    }
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

fn hung_on(missing: &[i64], last_failure: &Option<Failure>) -> String {
    match (missing, last_failure) {
        ([], None) => "the lighthouse has not answered".into(),
        ([], Some(failure)) => format!("the last request to the lighthouse failed: {failure}"),
        (ranks, _) => {
            format!("its group ranks {ranks:?} have not asked for a quorum; look at their logs")
        }
    }
}
