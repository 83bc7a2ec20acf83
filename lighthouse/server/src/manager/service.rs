//! The gRPC service of a manager server: convert, call the group's state, answer.

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status, async_trait};
use torchft_quorum::vote::RankVote;

use super::state::GroupState;
use crate::{
    deadline,
    wire::{
        CheckpointMetadataRequest, CheckpointMetadataResponse, KillRequest, KillResponse,
        ManagerQuorumRequest, ManagerQuorumResponse, ShouldCommitRequest, ShouldCommitResponse,
        manager_service_server::ManagerService,
    },
};

/// Ends the process, when an operator asks for it.
pub type Kill = fn(why: &str);

/// How long the reply to a kill may take to leave.
const REPLY: Duration = Duration::from_millis(100);

/// The gRPC service of one group.
#[derive(Debug)]
pub struct Service {
    /// Where the ranks wait for answers.
    pub state: Arc<GroupState>,
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
        let response = self.state.quorum(request.into_inner(), within).await?;
        Ok(Response::new(response))
    }

    async fn checkpoint_metadata(
        &self,
        request: Request<CheckpointMetadataRequest>,
    ) -> Result<Response<CheckpointMetadataResponse>, Status> {
        let checkpoint_metadata = self.state.checkpoint_metadata(request.get_ref().rank)?;
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
            self.state.rank_ends(message.group_rank, &message.ends);
            let should_commit = false;
            return Ok(Response::new(ShouldCommitResponse { should_commit }));
        }
        let vote = RankVote {
            group_rank: message.group_rank,
            step: message.step,
            commit: message.should_commit,
        };
        let should_commit = self.state.vote(vote, within).await?;
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
