//! What the coordinator asks the server to do: answer callers, and log events.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::decide::Formed;
use crate::member::{BadMember, CallId, Generation, Quorum, ReplicaId};
use crate::waiting::{Names, Waiting};

/// One thing for the server to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Answer these callers with the quorum; each of them is a member.
    Publish {
        /// The quorum for all of them.
        quorum: Arc<Quorum>,
        /// The call of each member.
        call_ids: Vec<CallId>,
        /// Why it formed now.
        why: Formed,
        /// Why the quorum id is a new one; `None`: it is that of the last quorum.
        renewed: Option<Renewal>,
    },
    /// Answer this caller with an error.
    Refuse {
        /// Whom.
        call_id: CallId,
        /// Why.
        refusal: Refusal,
    },
    /// Log an event.
    Notice(Notice),
}

/// Why a quorum id is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// There was no quorum before.
    First,
    /// The members differ from those of the last quorum.
    Members {
        /// New members.
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
    /// The request has impossible values.
    #[error(transparent)]
    BadMember(#[from] BadMember),
    /// The same replica asked again while this request waited.
    #[error("replica {replica_id} has asked again: this older request is superseded")]
    Superseded {
        /// Who.
        replica_id: ReplicaId,
    },
    /// The state to which this replica was told to heal is gone.
    #[error(transparent)]
    StateLost(#[from] StateLost),
    /// The caller's deadline passed while groups of another generation train.
    #[error(
        "replica {replica_id} runs {own}, and the job runs {job}: {}. The two cannot average with each \
         other, so {replica_id} waits until fewer than {min_replicas} of the others are left \
         (min_replicas); stop those first, or start {replica_id} with the same torchft as they",
        Names(waits_for)
    )]
    HeldBack {
        /// Who.
        replica_id: ReplicaId,
        /// What it runs.
        own: Generation,
        /// What quorums are formed of.
        job: Generation,
        /// The replicas that are counted instead.
        waits_for: Vec<ReplicaId>,
        /// A quorum has at least this many members.
        min_replicas: usize,
    },
    /// The caller's deadline passed. Who asked, and at which step, its own words say already.
    #[error(
        "waited until the deadline: {}{waiting}",
        own_silence(replica_id, silent_for)
    )]
    Deadline {
        /// Who.
        replica_id: ReplicaId,
        /// Its step.
        step: i64,
        /// How long this replica itself sent no heartbeat, if that was too long for it to count.
        silent_for: Option<Duration>,
        /// What it waited for.
        waiting: Waiting,
        /// The lighthouse itself was away or did not run for a part of that time.
        absent: bool,
    },
}

/// A replica was told to heal to a step and has not, and no replica that had that step is left.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the state of step {lost_step} is lost: replica {replica_id} is at step {step} and had to heal \
     from {}, of which none is left; either restart every replica group from a checkpoint of step \
     {lost_step} or later, or stop this process, so that new processes start afresh from the step \
     that they load",
    Names(donors)
)]
pub struct StateLost {
    /// The replica that had to heal.
    pub replica_id: ReplicaId,
    /// Its step.
    pub step: i64,
    /// The step that is lost.
    pub lost_step: i64,
    /// The replicas that had it.
    pub donors: Vec<ReplicaId>,
}

/// An event for the log: no caller waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The lighthouse itself did not run, so it received no heartbeats: every heartbeat timeout starts
    /// again.
    Paused {
        /// For how long.
        gap: Duration,
    },
    /// Several members of one quorum have the same group name.
    SameName {
        /// Their ids, which differ only in the suffix of their start, sorted.
        replica_ids: Vec<ReplicaId>,
    },
    /// A member of the last quorum sent no heartbeat for the heartbeat timeout.
    Died {
        /// Who.
        replica_id: ReplicaId,
    },
    /// Quorums are formed of another generation of managers from now on.
    OtherGeneration {
        /// The one before, of which too few groups are left.
        from: Generation,
        /// The new one.
        to: Generation,
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
                "this lighthouse did not run for {} ms and received no heartbeats: the heartbeat timeout \
                 of every replica starts again",
                gap.as_millis()
            ),
            Self::SameName { replica_ids } => write!(
                f,
                "several processes train under one group name: {}",
                Names(replica_ids)
            ),
            Self::Died { replica_id } => {
                write!(
                    f,
                    "replica {replica_id} of the last quorum sends no heartbeats: the next quorum does not \
                     wait for it"
                )
            }
            Self::OtherGeneration { from, to } => write!(
                f,
                "fewer than min_replicas groups of {from} are left: groups of {to}, which waited for \
                 that, form quorums from now on"
            ),
            Self::Restarted {
                from,
                to,
                quorum_id,
            } => write!(
                f,
                "quorum {quorum_id} goes on from step {to}, but the last quorum had reached step {from}: \
                 no replica with that step is left, or they loaded an older checkpoint on purpose"
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
            "replica {replica_id} is not counted, since it has sent no heartbeat for {} ms; also, ",
            age.as_millis()
        ),
    }
}
