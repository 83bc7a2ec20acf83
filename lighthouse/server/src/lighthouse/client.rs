//! A client of the lighthouse.

use std::time::Duration;

use crate::{
    connection::Connection,
    error::CallError,
    wire::{
        LighthouseHeartbeatRequest, LighthouseQuorumRequest, Quorum, QuorumMember,
        lighthouse_service_client::LighthouseServiceClient,
    },
};

/// A 512-member quorum is 60 KiB; with the users' data it may be much more than tonic's 4 MiB.
const LARGEST_REPLY: usize = 1 << 30;

/// A connection to a lighthouse.
#[derive(Debug)]
pub struct LighthouseClient {
    connection: Connection,
}

impl LighthouseClient {
    /// Connects, trying again until `within` has passed.
    ///
    /// # Errors
    /// The address has the wrong form, or the time is up.
    pub async fn connect(address: &str, within: Duration) -> Result<Self, CallError> {
        let connection = Connection::connect("lighthouse", address, within).await?;
        Ok(Self { connection })
    }

    /// Asks for a quorum. `last_quorum_id` is the highest one seen, 0 if there was none.
    ///
    /// # Errors
    /// The lighthouse's refusal; at a deadline it says what it waited for.
    pub async fn quorum(
        &self,
        requester: QuorumMember,
        last_quorum_id: i64,
        within: Duration,
    ) -> Result<Quorum, CallError> {
        let message = LighthouseQuorumRequest {
            requester: Some(requester),
            last_quorum_id,
        };
        let rpc = |channel, request| async move {
            let client = LighthouseServiceClient::new(channel);
            client
                .max_decoding_message_size(LARGEST_REPLY)
                .quorum(request)
                .await
        };
        let reply = self
            .connection
            .call("a quorum request", message, within, rpc)
            .await?;
        reply.decode_quorum().map_err(|error| {
            let message = format!("{} sent no readable quorum: {error}", self.name());
            CallError::failed(tonic::Code::Internal, message)
        })
    }

    /// Sends a heartbeat: `replica_id` is alive.
    ///
    /// # Errors
    /// The lighthouse did not answer in time, or not at all.
    pub async fn heartbeat(&self, replica_id: &str, within: Duration) -> Result<(), CallError> {
        let message = LighthouseHeartbeatRequest {
            replica_id: replica_id.to_owned(),
        };
        let rpc = |channel, request| async move {
            LighthouseServiceClient::new(channel)
                .heartbeat(request)
                .await
        };
        let reply = self
            .connection
            .call("a heartbeat", message, within, rpc)
            .await;
        reply.map(drop)
    }

    /// The word lighthouse and its address, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.connection.name()
    }
}
