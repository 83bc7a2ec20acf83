//! A client of a manager server; of one in the same process without gRPC.

use std::{sync::Arc, time::Duration};

use torchft_quorum::vote::Ballot;

use super::{desk::Desk, local};
use crate::{
    address,
    error::CallError,
    link::Link,
    wire::{
        CheckpointMetadataRequest, KillRequest, ManagerQuorumRequest, ManagerQuorumResponse,
        ShouldCommitRequest, manager_service_client::ManagerServiceClient,
    },
};

/// How the server is reached.
#[derive(Debug)]
enum Way {
    SameProcess(Arc<Desk>),
    Network(Box<Link>),
}

/// One rank's connection to a manager server.
#[derive(Debug)]
pub struct ManagerClient {
    way: Way,
}

impl ManagerClient {
    /// Connects, trying again until `within` has passed.
    ///
    /// # Errors
    /// The address has the wrong form, or the time is up.
    pub async fn connect(address: &str, within: Duration) -> Result<Self, CallError> {
        let address = address::dialable("manager", address)?;
        let way = match local::find(&address) {
            Some(desk) => Way::SameProcess(desk),
            None => Way::Network(Box::new(Link::connect("manager", &address, within).await?)),
        };
        Ok(Self { way })
    }

    /// Asks for a quorum, together with the other ranks of the group.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn quorum(
        &self,
        message: ManagerQuorumRequest,
        within: Duration,
    ) -> Result<ManagerQuorumResponse, CallError> {
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel).quorum(request).await
        };
        match &self.way {
            Way::SameProcess(desk) => desk.quorum(message, within).await,
            Way::Network(link) => link.call("a quorum request", message, within, rpc).await,
        }
    }

    /// Where the state of `rank` of that group can be fetched.
    ///
    /// # Errors
    /// That rank has not asked for a quorum yet; the server did not answer in time.
    pub async fn checkpoint_metadata(
        &self,
        rank: i64,
        within: Duration,
    ) -> Result<String, CallError> {
        let message = CheckpointMetadataRequest { rank };
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel)
                .checkpoint_metadata(request)
                .await
        };
        match &self.way {
            Way::SameProcess(desk) => desk.checkpoint_metadata(rank),
            Way::Network(link) => link
                .call("a request for checkpoint metadata", message, within, rpc)
                .await
                .map(|reply| reply.checkpoint_metadata),
        }
    }

    /// Votes on a step, and waits for the votes of the group's other ranks.
    ///
    /// # Errors
    /// The vote cannot count, or the others did not vote in time.
    pub async fn should_commit(&self, ballot: Ballot, within: Duration) -> Result<bool, CallError> {
        let message = ShouldCommitRequest {
            should_commit: ballot.commit,
            group_rank: ballot.group_rank,
            step: ballot.step,
            ends: String::new(),
        };
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel)
                .should_commit(request)
                .await
        };
        match &self.way {
            Way::SameProcess(desk) => desk.vote(ballot, Some(within)).await,
            Way::Network(link) => link
                .call("a vote", message, within, rpc)
                .await
                .map(|reply| reply.should_commit),
        }
    }

    /// Says that this rank cannot go on, so that the group's other ranks need not wait for it.
    ///
    /// # Errors
    /// The server did not answer in time.
    pub async fn end_group(
        &self,
        group_rank: i64,
        why: &str,
        within: Duration,
    ) -> Result<(), CallError> {
        let message = ShouldCommitRequest {
            group_rank,
            ends: why.to_owned(),
            ..Default::default()
        };
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel)
                .should_commit(request)
                .await
        };
        match &self.way {
            Way::SameProcess(desk) => {
                desk.rank_ends(group_rank, why);
                Ok(())
            }
            Way::Network(link) => {
                let told = link.call("the end of a rank", message, within, rpc);
                told.await.map(drop)
            }
        }
    }

    /// Ends the process that hosts the manager server.
    ///
    /// # Errors
    /// The server did not answer in time.
    pub async fn kill(address: &str, why: &str, within: Duration) -> Result<(), CallError> {
        let link = Link::connect("manager", address, within).await?;
        let message = KillRequest {
            msg: why.to_owned(),
        };
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel).kill(request).await
        };
        link.call("a kill", message, within, rpc).await.map(drop)
    }
}
