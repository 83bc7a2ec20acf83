//! The generated messages and services, and how messages become the core's values and back.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use prost::Message;
use torchft_quorum::{assign::Assignment, gather::RankAsk, member};

pub use proto::*;

#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
mod proto {
    tonic::include_proto!("torchft");
}

/// `LighthouseQuorumResponse` on the wire: a length-delimited field holds either a message or its
/// bytes, so the quorum is encoded once and every reply shares it.
#[derive(Clone, PartialEq, Message)]
pub struct EncodedQuorum {
    /// The encoded [`Quorum`].
    #[prost(bytes = "bytes", tag = "1")]
    pub quorum: Bytes,
}

impl EncodedQuorum {
    /// Encodes a quorum that was created now.
    #[must_use]
    pub fn of(quorum: &member::Quorum) -> Self {
        let members = quorum.members.iter();
        let message = Quorum {
            quorum_id: quorum.id,
            participants: members.map(|m| QuorumMember::from(&**m)).collect(),
            created: Some(SystemTime::now().into()),
        };
        let quorum = message.encode_to_vec().into();
        Self { quorum }
    }

    /// Decodes the quorum.
    ///
    /// # Errors
    /// The bytes are not an encoded quorum.
    pub fn decode_quorum(&self) -> Result<Quorum, prost::DecodeError> {
        Quorum::decode(self.quorum.clone())
    }
}

/// Whose manager server sends this; `None` when it is no manager server, which would have an address.
fn generation_of(message: &QuorumMember) -> Option<member::Generation> {
    let has_handles = message.reconfigure_handles.iter().any(|h| !h.is_empty());
    match message {
        _ if message.address.is_empty() => None,
        _ if message.init_sync.is_some() => Some(member::Generation::Own),
        _ if has_handles => Some(member::Generation::Handles),
        _ => Some(member::Generation::Store),
    }
}

impl From<QuorumMember> for member::Member {
    fn from(message: QuorumMember) -> Self {
        Self {
            generation: generation_of(&message),
            replica_id: message.replica_id.into(),
            address: message.address,
            store_address: message.store_address,
            step: message.step,
            world_size: message.world_size,
            shrink_only: message.shrink_only,
            data: message.data,
            commit_failures: message.commit_failures,
            init_sync: message.init_sync,
            final_sync: message.settling,
            handles: message
                .reconfigure_handles
                .into_iter()
                .map(Into::into)
                .collect(),
        }
    }
}

impl From<&member::Member> for QuorumMember {
    fn from(member: &member::Member) -> Self {
        Self {
            replica_id: member.replica_id.as_str().to_owned(),
            address: member.address.clone(),
            store_address: member.store_address.clone(),
            step: member.step,
            world_size: member.world_size,
            shrink_only: member.shrink_only,
            data: member.data.clone(),
            commit_failures: member.commit_failures,
            init_sync: member.init_sync,
            settling: member.final_sync,
            reconfigure_handles: text_of(&member.handles),
        }
    }
}

/// The core's quorum from one received at `now`. Another lighthouse may not have sorted it.
#[must_use]
pub fn quorum(message: Quorum, now: Duration) -> member::Quorum {
    let members = message.participants.into_iter();
    let mut members: Vec<_> = members.map(|m| Arc::new(m.into())).collect();
    members.sort_by(|a: &Arc<member::Member>, b| a.replica_id.cmp(&b.replica_id));
    member::Quorum {
        id: message.quorum_id,
        members,
        formed_at: now,
    }
}

/// A rank's request for a quorum as the core has it, with the deadline of its caller.
#[must_use]
pub fn rank_ask(message: ManagerQuorumRequest, deadline: Duration) -> RankAsk {
    RankAsk {
        group_rank: message.group_rank,
        step: message.step,
        checkpoint_metadata: message.checkpoint_metadata,
        shrink_only: message.shrink_only,
        init_sync: message.init_sync,
        final_sync: message.settling,
        commit_failures: message.commit_failures,
        handle: message.reconfigure_handle.into(),
        deadline,
    }
}

fn text_of(handles: &[member::Handle]) -> Vec<String> {
    let handles = handles.iter();
    handles.map(|handle| handle.as_str().to_owned()).collect()
}

impl From<Assignment> for ManagerQuorumResponse {
    fn from(assignment: Assignment) -> Self {
        let replica_ids = assignment.replica_ids.iter();
        let (source_rank, source_address) = match assignment.source {
            Some(source) => (Some(source.replica_rank), source.manager_address),
            None => (None, String::new()),
        };
        Self {
            quorum_id: assignment.quorum_id,
            heal: source_rank.is_some(),
            recover_src_manager_address: source_address,
            recover_src_replica_rank: source_rank,
            recover_dst_replica_ranks: assignment.recover_dst_replica_ranks,
            store_address: assignment.store_address,
            max_step: assignment.max_step,
            max_replica_rank: assignment.max_replica_rank,
            max_world_size: assignment.max_world_size,
            replica_rank: assignment.replica_rank,
            replica_world_size: assignment.replica_world_size,
            commit_failures: assignment.commit_failures,
            replica_ids: replica_ids.map(|id| id.as_str().to_owned()).collect(),
            reconfigure_handles: text_of(&assignment.handles),
            recovering_replica_ranks: assignment.recovering_replica_ranks,
            fresh_replica_ranks: assignment.fresh_replica_ranks,
            settling_replica_ranks: assignment.final_sync_replica_ranks,
            world_sizes: assignment.world_sizes,
        }
    }
}
