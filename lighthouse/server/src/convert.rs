//! Between messages and the core's values, field by field.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use torchft_quorum::{
    assign::Assignment,
    gather::RankAsk,
    member::{Member, Quorum},
};

use crate::wire;

/// A member as the core knows it.
#[must_use]
pub fn member(message: wire::QuorumMember) -> Member {
    Member {
        replica_id: message.replica_id.into(),
        address: message.address,
        store_address: message.store_address,
        step: message.step,
        world_size: message.world_size,
        shrink_only: message.shrink_only,
        data: message.data,
        commit_failures: message.commit_failures,
        init_sync: message.init_sync,
        settling: message.settling,
    }
}

/// A member as it travels.
#[must_use]
pub fn member_message(member: &Member) -> wire::QuorumMember {
    wire::QuorumMember {
        replica_id: member.replica_id.as_str().to_owned(),
        address: member.address.clone(),
        store_address: member.store_address.clone(),
        step: member.step,
        world_size: member.world_size,
        shrink_only: member.shrink_only,
        data: member.data.clone(),
        commit_failures: member.commit_failures,
        init_sync: member.init_sync,
        settling: member.settling,
    }
}

/// A quorum as it travels, created now.
#[must_use]
pub fn quorum_message(quorum: &Quorum) -> wire::Quorum {
    wire::Quorum {
        quorum_id: quorum.id,
        participants: quorum.members.iter().map(|m| member_message(m)).collect(),
        created: Some(SystemTime::now().into()),
    }
}

/// A quorum as the core knows it, received at `now`. Another lighthouse may not have sorted it.
#[must_use]
pub fn quorum(message: wire::Quorum, now: Duration) -> Quorum {
    let members = message.participants.into_iter();
    let mut members: Vec<_> = members.map(|m| Arc::new(member(m))).collect();
    members.sort_by(|a, b| a.replica_id.cmp(&b.replica_id));
    Quorum {
        id: message.quorum_id,
        members,
        formed_at: now,
    }
}

/// What a rank asks for, as the core knows it.
#[must_use]
pub fn rank_ask(message: wire::ManagerQuorumRequest, deadline: Duration) -> RankAsk {
    RankAsk {
        group_rank: message.group_rank,
        step: message.step,
        checkpoint_metadata: message.checkpoint_metadata,
        shrink_only: message.shrink_only,
        init_sync: message.init_sync,
        settling: message.settling,
        commit_failures: message.commit_failures,
        deadline,
    }
}

/// What a rank is told, as it travels.
#[must_use]
pub fn assignment_message(told: Assignment) -> wire::ManagerQuorumResponse {
    let replica_ids = told.replica_ids.iter().map(|id| id.as_str().to_owned());
    let (source_rank, source_address) = match told.source {
        Some(source) => (Some(source.replica_rank), source.manager_address),
        None => (None, String::new()),
    };
    wire::ManagerQuorumResponse {
        quorum_id: told.quorum_id,
        heal: source_rank.is_some(),
        recover_src_manager_address: source_address,
        recover_src_replica_rank: source_rank,
        recover_dst_replica_ranks: told.recover_dst_replica_ranks,
        store_address: told.store_address,
        max_step: told.max_step,
        max_replica_rank: told.max_replica_rank,
        max_world_size: told.max_world_size,
        replica_rank: told.replica_rank,
        replica_world_size: told.replica_world_size,
        commit_failures: told.commit_failures,
        replica_ids: replica_ids.collect(),
        recovering_replica_ranks: told.recovering_replica_ranks,
        fresh_replica_ranks: told.fresh_replica_ranks,
        settling_replica_ranks: told.settling_replica_ranks,
        world_sizes: told.world_sizes,
    }
}
