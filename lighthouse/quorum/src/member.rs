//! A member is one replica group as it asks for a quorum; a quorum is the list of those that take
//! part in a step, sorted by replica id, under an id that never comes again.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

/// Above this a quorum id is taken for garbage: ids are milliseconds since 1970 and count up.
const HIGHEST_BELIEVABLE_ID: i64 = i64::MAX / 2;

/// The name of one start of a replica group: the group's name, `:`, and a suffix fresh for each
/// start. Ordered as text, which is the order of ranks in a quorum.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(Arc<str>);

impl ReplicaId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The group's name, without the suffix of this start; `None` for an id without one.
    pub fn group(&self) -> Option<&str> {
        self.0.rsplit_once(':').map(|(group, _)| group)
    }
}

impl From<&str> for ReplicaId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl From<String> for ReplicaId {
    fn from(id: String) -> Self {
        Self(id.into())
    }
}

impl Borrow<str> for ReplicaId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// The shell's handle of one caller that waits for an answer. The shell gives each call a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// One replica group, as it asks for a quorum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who asks.
    pub replica_id: ReplicaId,
    /// Its manager server, `http://host:port`.
    pub address: String,
    /// Its rendezvous store, `host:port`.
    pub store_address: String,
    /// The last step it committed.
    pub step: i64,
    /// Ranks in the group.
    pub world_size: u64,
    /// Asks that nobody is taken in who was not in the last quorum.
    pub shrink_only: bool,
    /// JSON, the user's; passed on unread.
    pub data: String,
    /// Steps it discarded in a row; above 0 it asks for new communicators everywhere.
    pub commit_failures: i64,
    /// `Some(true)`: this process has not been in a quorum yet and wants the initial
    /// synchronisation. `None`: a manager that does not say.
    pub init_sync: Option<bool>,
    /// It ends its run, and is in this quorum only for those that are behind.
    pub settling: bool,
}

impl Member {
    /// A member with this name and step, one rank, no addresses and no wishes.
    pub fn new(replica_id: impl Into<ReplicaId>, step: i64) -> Self {
        Self {
            replica_id: replica_id.into(),
            address: String::new(),
            store_address: String::new(),
            step,
            world_size: 1,
            shrink_only: false,
            data: String::new(),
            commit_failures: 0,
            init_sync: None,
            settling: false,
        }
    }

    /// Whether its process has not been in a quorum yet, as far as it says.
    pub fn is_fresh(&self) -> bool {
        self.init_sync == Some(true)
    }

    /// Refuses what no group can mean.
    pub(crate) fn check(&self, last_quorum_id: i64) -> Result<(), BadMember> {
        if self.replica_id.as_str().is_empty() {
            return Err(BadMember::NoName);
        }
        let replica_id = self.replica_id.clone();
        if self.step < 0 {
            let step = self.step;
            return Err(BadMember::NegativeStep { replica_id, step });
        }
        if last_quorum_id > HIGHEST_BELIEVABLE_ID {
            return Err(BadMember::QuorumId {
                replica_id,
                last_quorum_id,
            });
        }
        Ok(())
    }
}

/// Why a member cannot be listened to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadMember {
    /// The replica id is empty.
    #[error("the request has an empty replica_id: give the replica group a name")]
    NoName,
    /// The step is below 0.
    #[error("replica {replica_id} asks at step {step}: steps start at 0")]
    NegativeStep {
        /// Who asks.
        replica_id: ReplicaId,
        /// What it said.
        step: i64,
    },
    /// The last quorum id that it claims to have seen cannot have come from a lighthouse.
    #[error(
        "replica {replica_id} says that it has seen quorum id {last_quorum_id}, which no lighthouse gave out"
    )]
    QuorumId {
        /// Who asks.
        replica_id: ReplicaId,
        /// What it said.
        last_quorum_id: i64,
    },
}

/// The replica groups that take part in a step. Decided once, shared by all who are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quorum {
    /// Rises whenever the process groups must be rebuilt; never repeats.
    pub id: i64,
    /// At least one, sorted by replica id; the index is the replica rank.
    pub members: Vec<Arc<Member>>,
    /// When it was decided, on the machine's clock.
    pub formed_at: Duration,
}

impl Quorum {
    /// The highest step among the members: where all of them are when they have healed.
    pub fn max_step(&self) -> i64 {
        self.members.iter().map(|m| m.step).max().unwrap_or(0)
    }

    /// The member of this name.
    pub fn member(&self, replica_id: &str) -> Option<&Arc<Member>> {
        let found = self
            .members
            .binary_search_by(|m| m.replica_id.as_str().cmp(replica_id));
        found.ok().map(|rank| &self.members[rank])
    }

    /// All names in rank order.
    pub fn replica_ids(&self) -> impl Iterator<Item = &ReplicaId> {
        self.members.iter().map(|m| &m.replica_id)
    }
}

/// `rank 0 at step 5, rank 1 at step 6`
pub(crate) struct RankSteps<'a>(pub(crate) &'a [(i64, i64)]);

impl fmt::Display for RankSteps<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (rank, step)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}rank {rank} at step {step}")?;
        }
        Ok(())
    }
}
