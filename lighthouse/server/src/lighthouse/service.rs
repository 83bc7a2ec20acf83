//! The lighthouse's gRPC service: convert, call the desk, answer.

use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};

use super::desk::Desk;
use crate::{
    convert, deadline,
    wire::{
        EncodedQuorum, LighthouseHeartbeatRequest, LighthouseHeartbeatResponse,
        LighthouseQuorumRequest, lighthouse_service_server::LighthouseService,
    },
};

/// The service over a desk.
#[derive(Debug)]
pub struct Service(pub Arc<Desk>);

#[async_trait]
impl LighthouseService for Service {
    async fn quorum(
        &self,
        request: Request<LighthouseQuorumRequest>,
    ) -> Result<Response<EncodedQuorum>, Status> {
        let within = deadline::timeout_of(request.metadata())?.map(deadline::answer_within);
        let message = request.into_inner();
        let Some(requester) = message.requester else {
            return Err(Status::invalid_argument("the request has no requester"));
        };
        let member = convert::member(requester);
        let quorum = self
            .0
            .quorum(member, message.last_quorum_id, within)
            .await?;
        Ok(Response::new(quorum))
    }

    async fn heartbeat(
        &self,
        request: Request<LighthouseHeartbeatRequest>,
    ) -> Result<Response<LighthouseHeartbeatResponse>, Status> {
        self.0.heartbeat(&request.get_ref().replica_id);
        Ok(Response::new(LighthouseHeartbeatResponse {}))
    }
}
