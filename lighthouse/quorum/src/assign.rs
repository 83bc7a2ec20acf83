//! Which rank a group has in a quorum, which store its ranks meet at, and who heals from whom.
//!
//! Everybody computes this alone from the same quorum, so it depends on nothing else.

use thiserror::Error;

use crate::member::{Quorum, ReplicaId};

/// What one rank of one group is told of a quorum. Replica ranks are positions in the quorum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The quorum's id.
    pub quorum_id: i64,
    /// This group's rank.
    pub replica_rank: i64,
    /// Groups in the quorum.
    pub replica_world_size: i64,
    /// All names in rank order.
    pub replica_ids: Vec<ReplicaId>,
    /// The highest step.
    pub max_step: i64,
    /// This group's position among those at the highest step; `None` if it is behind.
    pub max_replica_rank: Option<i64>,
    /// Groups at the highest step.
    pub max_world_size: i64,
    /// The rendezvous store at which all groups' ranks with this group rank meet.
    pub store_address: String,
    /// Where this group heals from; `None`: it does not.
    pub source: Option<Source>,
    /// Replica ranks that heal from this group.
    pub recover_dst_replica_ranks: Vec<i64>,
    /// Replica ranks that heal in this quorum: the same list for all groups.
    pub recovering_replica_ranks: Vec<i64>,
    /// Replica ranks that asked with `init_sync`.
    pub fresh_replica_ranks: Vec<i64>,
    /// The most discarded steps in a row of any member.
    pub commit_failures: i64,
}

/// A donor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its rank.
    pub replica_rank: i64,
    /// Its manager server.
    pub manager_address: String,
}

/// The replica is no member.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("replica {replica_id} is not in quorum {quorum_id}: ask for the next one")]
pub struct NotInQuorum {
    /// Who asked.
    pub replica_id: ReplicaId,
    /// For which quorum.
    pub quorum_id: i64,
}

/// Tells the rank `group_rank` of `replica_id` what it has to do in `quorum`. `init_sync` is that
/// rank's own wish: it stands in for members that do not say.
pub fn assign(
    quorum: &Quorum,
    replica_id: &str,
    group_rank: i64,
    init_sync: bool,
) -> Result<Assignment, NotInQuorum> {
    todo!("{quorum:?} {replica_id} {group_rank} {init_sync}")
}
