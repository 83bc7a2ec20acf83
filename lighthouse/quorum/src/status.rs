//! What a lighthouse shows of itself.

use std::sync::Arc;
use std::time::Duration;

use crate::member::{Quorum, ReplicaId};
use crate::waiting::Waiting;

/// A picture of the machine at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The last quorum, if there was one.
    pub quorum: Option<Arc<Quorum>>,
    /// Why the next quorum waits; `NobodyAsks` when idle.
    pub waiting: Waiting,
    /// All ids that are remembered, sorted.
    pub replicas: Vec<ReplicaStatus>,
}

/// One remembered id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Who.
    pub replica_id: ReplicaId,
    /// Since its last heartbeat or request.
    pub heartbeat_age: Duration,
    /// Whether that is less than the heartbeat timeout.
    pub healthy: bool,
    /// The step at which it asks for a quorum; `None`: it does not ask.
    pub asks_at: Option<i64>,
    /// Whether it is a member of the last quorum.
    pub in_last_quorum: bool,
}
