//! The state of a lighthouse for the status page.

use std::sync::Arc;
use std::time::Duration;

use crate::member::{Quorum, ReplicaId};
use crate::waiting::Waiting;

/// The state of the coordinator at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The last quorum, if there was one.
    pub quorum: Option<Arc<Quorum>>,
    /// Why the next quorum waits; `NobodyAsks` when no replica asks.
    pub waiting: Waiting,
    /// All replicas that are remembered, sorted by id.
    pub replicas: Vec<ReplicaStatus>,
}

/// One replica that is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// The replica.
    pub replica_id: ReplicaId,
    /// Time since its last heartbeat or request.
    pub heartbeat_age: Duration,
    /// Whether that is less than the heartbeat timeout.
    pub healthy: bool,
    /// The step at which it asks for a quorum; `None`: it does not ask.
    pub asks_at: Option<i64>,
    /// Whether it is a member of the last quorum.
    pub in_last_quorum: bool,
}
