//! A client of a manager server; one in the same process is called without gRPC.

use std::{sync::Arc, time::Duration};

use torchft_quorum::vote::RankVote;

use super::{local, state::GroupState};
use crate::{
    address,
    connection::Connection,
    error::CallError,
    wire::{
        CheckpointMetadataRequest, KillRequest, ManagerQuorumRequest, ManagerQuorumResponse,
        ShouldCommitRequest, manager_service_client::ManagerServiceClient,
    },
};

/// One rank's client of a manager server.
#[derive(Debug)]
pub enum ManagerClient {
    /// The server runs in this process.
    SameProcess(Arc<GroupState>),
    /// The server is reached over the network.
    Network(Box<Connection>),
}

impl ManagerClient {
    /// Connects, trying again until `within` has passed.
    ///
    /// # Errors
    /// The address has the wrong form, or the time is up.
    pub async fn connect(address: &str, within: Duration) -> Result<Self, CallError> {
        let address = address::dialable("manager", address)?;
        if let Some(state) = local::find(&address) {
            return Ok(Self::SameProcess(state));
        }
        let connection = Connection::connect("manager", &address, within).await?;
        Ok(Self::Network(Box::new(connection)))
    }

    /// Asks for a quorum, together with the other ranks of the group.
    ///
    /// # Errors
    /// Why there is no quorum.
    pub async fn quorum(
        &self,
        message: ManagerQuorumRequest,
        within: Duration,
    ) -> Result<ManagerQuorumResponse, CallError> {
        let connection = match self {
            Self::SameProcess(state) => return state.quorum(message, within).await,
            Self::Network(connection) => connection,
        };
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel).quorum(request).await
        };
        connection
            .call("a quorum request", message, within, rpc)
            .await
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
        let connection = match self {
            Self::SameProcess(state) => return state.checkpoint_metadata(rank),
            Self::Network(connection) => connection,
        };
        let message = CheckpointMetadataRequest { rank };
        let rpc = |channel, request| async move {
            let mut client = ManagerServiceClient::new(channel);
            client.checkpoint_metadata(request).await
        };
        let what = "a request for checkpoint metadata";
        let reply = connection.call(what, message, within, rpc).await?;
        Ok(reply.checkpoint_metadata)
    }

    /// Votes on a step, and waits for the votes of the group's other ranks. Returns whether all of
    /// them voted for the step.
    ///
    /// # Errors
    /// The vote cannot count, or the others did not vote in time.
    pub async fn should_commit(&self, vote: RankVote, within: Duration) -> Result<bool, CallError> {
        let connection = match self {
            Self::SameProcess(state) => return state.vote(vote, Some(within)).await,
            Self::Network(connection) => connection,
        };
        let message = ShouldCommitRequest {
            should_commit: vote.commit,
            group_rank: vote.group_rank,
            step: vote.step,
            ends: String::new(),
        };
        send_vote(connection, "a vote", message, within).await
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
        let connection = match self {
            Self::SameProcess(state) => {
                state.rank_ends(group_rank, why);
                return Ok(());
            }
            Self::Network(connection) => connection,
        };
        let message = ShouldCommitRequest {
            group_rank,
            ends: why.to_owned(),
            ..Default::default()
        };
        let sent = send_vote(connection, "the end of a rank", message, within);
        sent.await.map(drop)
    }

    /// Ends the process that hosts the manager server.
    ///
    /// # Errors
    /// The server did not answer in time.
    pub async fn kill(address: &str, why: &str, within: Duration) -> Result<(), CallError> {
        let connection = Connection::connect("manager", address, within).await?;
        let msg = why.to_owned();
        let rpc = |channel, request| async move {
            ManagerServiceClient::new(channel).kill(request).await
        };
        let sent = connection.call("a kill", KillRequest { msg }, within, rpc);
        sent.await.map(drop)
    }
}

async fn send_vote(
    connection: &Connection,
    what: &str,
    message: ShouldCommitRequest,
    within: Duration,
) -> Result<bool, CallError> {
    let rpc = |channel, request| async move {
        let mut client = ManagerServiceClient::new(channel);
        client.should_commit(request).await
    };
    let reply = connection.call(what, message, within, rpc).await?;
    Ok(reply.should_commit)
}
