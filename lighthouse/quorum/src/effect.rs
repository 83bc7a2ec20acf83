//! What the machine asks its shell to do: answer callers, and tell people.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::decide::Formed;
use crate::member::{BadMember, Quorum, ReplicaId, Ticket};
use crate::waiting::{Names, Waiting};

/// One thing for the shell to carry out, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Answer these callers with the quorum; each of them is a member.
    Publish {
        /// What all of them get.
        quorum: Arc<Quorum>,
        /// One a member.
        tickets: Vec<Ticket>,
        /// Why now.
        why: Formed,
        /// Why the quorum id is a new one; `None`: it is that of the last quorum.
        renewed: Option<Renewal>,
    },
    /// Answer this caller with an error.
    Refuse {
        /// Whom.
        ticket: Ticket,
        /// Why.
        refusal: Refusal,
    },
    /// Tell people.
    Notice(Notice),
}

/// Why a quorum id is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// There was no quorum before.
    First,
    /// The members differ from those of the last quorum.
    Members {
        /// New ones.
        joined: Vec<ReplicaId>,
        /// Members of the last quorum that are not in this one.
        left: Vec<ReplicaId>,
    },
    /// These discarded their last step and ask for new communicators.
    CommitFailures(Vec<ReplicaId>),
    /// The names are the same, but behind these is another process.
    NewProcess(Vec<ReplicaId>),
    /// Members have seen a higher id than this lighthouse gave out.
    SeenHigher(i64),
}

/// Why a caller gets an error instead of a quorum.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The request makes no sense.
    #[error(transparent)]
    BadMember(#[from] BadMember),
    /// The same replica asked again while this request waited.
    #[error("replica {replica_id} has asked again: this older request is superseded")]
    Superseded {
        /// Who.
        replica_id: ReplicaId,
    },
    /// The state that this replica was to heal to is gone.
    #[error(transparent)]
    StateLost(#[from] StateLost),
    /// The caller's deadline passed. Who asked, and at which step, its own words say already.
    #[error(
        "waited until the deadline: {}{waiting}",
        own_silence(replica_id, silent_for)
    )]
    Deadline {
        /// Who.
        replica_id: ReplicaId,
        /// Where it is.
        step: i64,
        /// How long it was not heard itself, if that was too long for it to count.
        silent_for: Option<Duration>,
        /// What it waited for.
        waiting: Waiting,
        /// The lighthouse itself was away or stood still for a part of that time.
        absent: bool,
    },
}

/// A replica was told to heal to a step, has not, and nobody who had that step is left.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the state of step {lost_step} is lost: replica {replica_id} is at step {step} and was to heal \
     from {}, of which none is left; either restart every replica group from a checkpoint of step \
     {lost_step} or later, or stop this process, so that new processes start afresh from the step \
     that they load",
    Names(donors)
)]
pub struct StateLost {
    /// Who was to heal.
    pub replica_id: ReplicaId,
    /// Where it is.
    pub step: i64,
    /// The step that is lost.
    pub lost_step: i64,
    /// Those who had it.
    pub donors: Vec<ReplicaId>,
}

/// What people should know, though nobody waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The lighthouse itself did not run, so it could hear nobody: silences are counted anew.
    Paused {
        /// For how long.
        gap: Duration,
    },
    /// Groups of a name are members of one quorum: several processes were started under it.
    SameName {
        /// Whose names are equal up to the suffix of their start, sorted.
        replica_ids: Vec<ReplicaId>,
    },
    /// A member of the last quorum was silent for the heartbeat timeout.
    FellSilent {
        /// Who.
        replica_id: ReplicaId,
    },
    /// Training goes on from an earlier step than the last quorum had reached.
    Restarted {
        /// The step that the last quorum had reached.
        from: i64,
        /// The highest step of the new one.
        to: i64,
        /// The new one.
        quorum_id: i64,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paused { gap } => write!(
                f,
                "this lighthouse did not run for {} ms and heard nobody: everybody is given a new \
                 heartbeat timeout",
                gap.as_millis()
            ),
            Self::SameName { replica_ids } => write!(
                f,
                "several processes train under one group name: {}",
                Names(replica_ids)
            ),
            Self::FellSilent { replica_id } => {
                write!(
                    f,
                    "replica {replica_id} of the last quorum has fallen silent"
                )
            }
            Self::Restarted {
                from,
                to,
                quorum_id,
            } => write!(
                f,
                "quorum {quorum_id} goes on from step {to}, though the last one had reached step \
                 {from}: nobody is left who has that step, or its owners went back on purpose"
            ),
        }
    }
}

impl fmt::Display for Renewal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("the first quorum"),
            Self::Members { joined, left } => {
                write!(
                    f,
                    "members changed: +[{}] -[{}]",
                    Names(joined),
                    Names(left)
                )
            }
            Self::CommitFailures(ids) => write!(f, "commit failures in [{}]", Names(ids)),
            Self::NewProcess(ids) => write!(f, "new processes behind [{}]", Names(ids)),
            Self::SeenHigher(id) => write!(f, "a member has seen quorum id {id}"),
        }
    }
}

fn own_silence(replica_id: &ReplicaId, silent_for: &Option<Duration>) -> String {
    match silent_for {
        None => String::new(),
        Some(age) => format!(
            "replica {replica_id} does not count, since it has sent no heartbeat for {} ms; besides, ",
            age.as_millis()
        ),
    }
}
