"""Names and numbers on the wire are those of existing peers; our own start at 1000."""

from __future__ import annotations

import pytest
from helpers.stubs import Stubs

KNOWN = {
    "QuorumMember": "replica_id address store_address step world_size shrink_only data "
    "commit_failures reconfigure_handles",
    "Quorum": "quorum_id participants created",
    "LighthouseQuorumRequest": "requester",
    "LighthouseQuorumResponse": "quorum",
    "LighthouseHeartbeatRequest": "replica_id",
    "LighthouseHeartbeatResponse": "",
    "ManagerQuorumRequest": "group_rank step checkpoint_metadata shrink_only init_sync "
    "commit_failures reconfigure_handle",
    "ManagerQuorumResponse": "quorum_id recover_src_manager_address recover_src_replica_rank "
    "recover_dst_replica_ranks store_address max_step max_replica_rank max_world_size "
    "replica_rank replica_world_size heal commit_failures replica_ids "
    "reconfigure_handles",
    "CheckpointMetadataRequest": "rank",
    "CheckpointMetadataResponse": "checkpoint_metadata",
    "ShouldCommitRequest": "should_commit group_rank step",
    "ShouldCommitResponse": "should_commit",
    "KillRequest": "msg",
    "KillResponse": "",
}
"""Field names in the order of their numbers, which count from 1."""

METHODS = {
    "LighthouseService": {"Quorum", "Heartbeat"},
    "ManagerService": {"Quorum", "CheckpointMetadata", "ShouldCommit", "Kill"},
}


@pytest.mark.parametrize("message", KNOWN)
def test_fields_of_existing_peers_keep_their_numbers(stubs: Stubs, message: str) -> None:
    fields = stubs.messages.DESCRIPTOR.message_types_by_name[message].fields
    theirs = {f.name: f.number for f in fields if f.number < 1000}
    assert theirs == {name: i for i, name in enumerate(KNOWN[message].split(), 1)}


def test_no_message_is_without_a_row_here(stubs: Stubs) -> None:
    assert set(stubs.messages.DESCRIPTOR.message_types_by_name) == set(KNOWN)


def test_services_keep_package_and_methods(stubs: Stubs) -> None:
    assert stubs.messages.DESCRIPTOR.package == "torchft"
    services = stubs.messages.DESCRIPTOR.services_by_name
    found = {name: {m.name for m in service.methods} for name, service in services.items()}
    assert found == METHODS
