//! A member is one replica group as it asks for a quorum; a quorum is the list of those that take
//! part in a step, sorted by replica id, under an id that is never used again.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

/// No quorum id is above this: ids start at the milliseconds since 1970 and count up.
const HIGHEST_ID: i64 = i64::MAX / 2;

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

/// Where the process group of one rank can be met: text of its own, passed on unread. Empty for a
/// rank that does not say.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Handle(Arc<str>);

impl Handle {
    /// The handle as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for Handle {
    fn from(handle: String) -> Self {
        Self(handle.into())
    }
}

/// Its length alone: a log line may hold the handles of every rank of a job.
impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({} bytes)", self.0.len())
    }
}

/// Whose managers a group runs, as far as its request shows. Groups of two generations cannot read
/// each other's state, and divide their averages by other rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    /// They meet at a store.
    Store,
    /// They meet by handles.
    Handles,
    /// They say what only ours say.
    Own,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Store => "PyTorch's torchft up to 0.2",
            Self::Handles => "PyTorch's torchft from 0.3 on",
            Self::Own => "this torchft",
        })
    }
}

/// Identifies one call that waits for an answer. The server gives each call a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// One replica group, as it asks for a quorum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The replica that asks.
    pub replica_id: ReplicaId,
    /// Its manager server, `http://host:port`.
    pub address: String,
    /// Its rendezvous store, `host:port`.
    pub store_address: String,
    /// The last step it committed.
    pub step: i64,
    /// Ranks in the group.
    pub world_size: u64,
    /// Asks for a quorum without groups that were not in the last one.
    pub shrink_only: bool,
    /// The user's data as JSON; passed on unread.
    pub data: String,
    /// Steps it discarded in a row; above 0 it asks all groups for new process groups.
    pub commit_failures: i64,
    /// `Some(true)`: this process has not been in a quorum yet and needs initial weights. `None`: its
    /// manager does not say.
    pub init_sync: Option<bool>,
    /// The final sync: it ends its run, and is in this quorum only for groups that are behind.
    pub final_sync: bool,
    /// Of each of its ranks in this round, by group rank; empty if none of them says.
    pub handles: Vec<Handle>,
    /// Whose managers it runs. `None`: its request does not show, and it can be in any quorum.
    pub generation: Option<Generation>,
}

impl Member {
    /// A member with this name and step and one rank; all else is empty.
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
            final_sync: false,
            handles: Vec::new(),
            generation: None,
        }
    }

    /// The handle of one of its ranks; empty if it has not said.
    pub fn handle(&self, group_rank: i64) -> Handle {
        let index = usize::try_from(group_rank).ok();
        index
            .and_then(|i| self.handles.get(i))
            .cloned()
            .unwrap_or_default()
    }

    /// Whether its process has not been in a quorum yet, as far as it says.
    pub fn is_fresh(&self) -> bool {
        self.init_sync == Some(true)
    }

    /// Refuses impossible values.
    pub(crate) fn check(&self, last_quorum_id: i64) -> Result<(), BadMember> {
        if self.replica_id.as_str().is_empty() {
            return Err(BadMember::NoName);
        }
        let replica_id = self.replica_id.clone();
        if self.step < 0 {
            let step = self.step;
            return Err(BadMember::NegativeStep { replica_id, step });
        }
        if last_quorum_id > HIGHEST_ID {
            return Err(BadMember::QuorumId {
                replica_id,
                last_quorum_id,
            });
        }
        Ok(())
    }
}

/// Why a request is refused at once.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadMember {
    /// The replica id is empty.
    #[error("the request has an empty replica_id: give the replica group a name")]
    NoName,
    /// The step is below 0.
    #[error("replica {replica_id} asks at step {step}: steps start at 0")]
    NegativeStep {
        /// The replica that asks.
        replica_id: ReplicaId,
        /// The value in the request.
        step: i64,
    },
    /// No lighthouse can have given out the last quorum id in the request.
    #[error(
        "replica {replica_id} has seen quorum id {last_quorum_id}, which no lighthouse can have given out"
    )]
    QuorumId {
        /// The replica that asks.
        replica_id: ReplicaId,
        /// The value in the request.
        last_quorum_id: i64,
    },
}

/// The replica groups that take part in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quorum {
    /// Rises whenever the process groups must be rebuilt; never repeats.
    pub id: i64,
    /// At least one, sorted by replica id; the index is the replica rank.
    pub members: Vec<Arc<Member>>,
    /// When it was decided, on the coordinator's clock.
    pub formed_at: Duration,
}

impl Quorum {
    /// The highest step among the members, which all of them have after healing.
    pub fn max_step(&self) -> i64 {
        self.members.iter().map(|m| m.step).max().unwrap_or(0)
    }

    /// The member with this replica id.
    pub fn member(&self, replica_id: &str) -> Option<&Arc<Member>> {
        let found = self
            .members
            .binary_search_by(|m| m.replica_id.as_str().cmp(replica_id));
        found.ok().map(|rank| &self.members[rank])
    }

    /// All replica ids in rank order.
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
