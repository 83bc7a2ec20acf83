//! The web page, the status and the health check of the lighthouse, on the gRPC port.
//!
//! The page loads nothing from elsewhere and changes nothing: no request to it ends a process.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::State,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};
use serde::Serialize;
use torchft_quorum::{
    member::{Member, Quorum},
    status::{ReplicaStatus, Status},
};

use super::state::LighthouseState;

const PAGE: &str = include_str!("page.html");
/// Only what the page itself contains may run, and nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                      connect-src 'self'; frame-ancestors 'none'";

/// `GET /`, `GET /healthz` and `GET /status.json`.
pub fn router(state: Arc<LighthouseState>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/status.json", get(status))
        .with_state(state)
}

async fn page() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(PAGE))
}

async fn status(State(state): State<Arc<LighthouseState>>) -> Json<StatusJson> {
    Json(state.status().into())
}

#[derive(Serialize)]
struct StatusJson {
    /// The last quorum; null before the first.
    quorum: Option<QuorumJson>,
    /// Why the next quorum waits.
    waiting: String,
    /// Every replica id that is remembered, sorted.
    replicas: Vec<ReplicaJson>,
}

#[derive(Serialize)]
struct QuorumJson {
    quorum_id: i64,
    max_step: i64,
    members: Vec<MemberJson>,
}

#[derive(Serialize)]
struct MemberJson {
    replica_id: String,
    address: String,
    store_address: String,
    step: i64,
    world_size: u64,
    commit_failures: i64,
}

#[derive(Serialize)]
struct ReplicaJson {
    replica_id: String,
    /// Since the last heartbeat or request.
    heartbeat_age_ms: u64,
    healthy: bool,
    /// The step at which it asks for a quorum; null when it does not ask.
    asks_at_step: Option<i64>,
    in_last_quorum: bool,
}

impl From<Status> for StatusJson {
    fn from(status: Status) -> Self {
        Self {
            quorum: status.quorum.as_deref().map(QuorumJson::from),
            waiting: status.waiting.to_string(),
            replicas: status.replicas.iter().map(ReplicaJson::from).collect(),
        }
    }
}

impl From<&Quorum> for QuorumJson {
    fn from(quorum: &Quorum) -> Self {
        Self {
            quorum_id: quorum.id,
            max_step: quorum.max_step(),
            members: quorum
                .members
                .iter()
                .map(|m| MemberJson::from(&**m))
                .collect(),
        }
    }
}

impl From<&Member> for MemberJson {
    fn from(member: &Member) -> Self {
        Self {
            replica_id: member.replica_id.to_string(),
            address: member.address.clone(),
            store_address: member.store_address.clone(),
            step: member.step,
            world_size: member.world_size,
            commit_failures: member.commit_failures,
        }
    }
}

impl From<&ReplicaStatus> for ReplicaJson {
    fn from(replica: &ReplicaStatus) -> Self {
        let age = replica.heartbeat_age.as_millis();
        Self {
            replica_id: replica.replica_id.to_string(),
            heartbeat_age_ms: u64::try_from(age).unwrap_or(u64::MAX),
            healthy: replica.healthy,
            asks_at_step: replica.asks_at,
            in_last_quorum: replica.in_last_quorum,
        }
    }
}
