//! The manager's gRPC service: convert, call the desk, answer.

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status, async_trait};
use torchft_quorum::vote::Ballot;

use super::desk::Desk;
use crate::{
    deadline,
    wire::{
        CheckpointMetadataRequest, CheckpointMetadataResponse, KillRequest, KillResponse,
        ManagerQuorumRequest, ManagerQuorumResponse, ShouldCommitRequest, ShouldCommitResponse,
        manager_service_server::ManagerService,
    },
};

/// What happens to the process when an operator asks for its end.
pub type Kill = fn(why: &str);

/// Time for the reply to a kill to leave.
const REPLY: Duration = Duration::from_millis(100);

/// The service over a desk.
#[derive(Debug)]
pub struct Service {
    /// Where the ranks wait.
    pub desk: Arc<Desk>,
    /// Carries out [`ManagerService::kill`].
    pub kill: Kill,
}

#[async_trait]
impl ManagerService for Service {
    async fn quorum(
        &self,
        request: Request<ManagerQuorumRequest>,
    ) -> Result<Response<ManagerQuorumResponse>, Status> {
        let Some(within) = deadline::timeout_of(request.metadata())? else {
            return Err(Status::invalid_argument(
                "a quorum request needs a deadline: set the grpc-timeout header",
            ));
        };
        let within = deadline::answer_within(within);
        let told = self.desk.quorum(request.into_inner(), within).await?;
        Ok(Response::new(told))
    }

    async fn checkpoint_metadata(
        &self,
        request: Request<CheckpointMetadataRequest>,
    ) -> Result<Response<CheckpointMetadataResponse>, Status> {
        let checkpoint_metadata = self.desk.checkpoint_metadata(request.get_ref().rank)?;
        let response = CheckpointMetadataResponse {
            checkpoint_metadata,
        };
        Ok(Response::new(response))
    }

    async fn should_commit(
        &self,
        request: Request<ShouldCommitRequest>,
    ) -> Result<Response<ShouldCommitResponse>, Status> {
        let within = deadline::timeout_of(request.metadata())?.map(deadline::answer_within);
        let message = request.into_inner();
        if !message.ends.is_empty() {
            self.desk.rank_ends(message.group_rank, &message.ends);
            let should_commit = false;
            return Ok(Response::new(ShouldCommitResponse { should_commit }));
        }
        let ballot = Ballot {
            group_rank: message.group_rank,
            step: message.step,
            commit: message.should_commit,
        };
        let should_commit = self.desk.vote(ballot, within).await?;
        Ok(Response::new(ShouldCommitResponse { should_commit }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<KillResponse>, Status> {
        let kill = self.kill;
        let why = format!("it was told to end: {:?}", request.into_inner().msg);
        tokio::spawn(async move {
            tokio::time::sleep(REPLY).await;
            kill(&why);
        });
        Ok(Response::new(KillResponse {}))
    }
}
