//! `QuorumResult`: what one rank is told of a quorum.

use pyo3::prelude::*;
use torchft_server::wire;

/// What one rank is told of a quorum. Replica ranks are positions in the quorum.
///
/// Args:
///     None: it starts as a quorum of one, and every field can be set (tests do).
#[pyclass(get_all, set_all, module = "torchft._torchft")]
pub struct QuorumResult {
    quorum_id: i64,
    replica_rank: i64,
    replica_world_size: i64,
    /// The donor's manager server; empty if this rank does not heal.
    recover_src_manager_address: String,
    recover_src_replica_rank: Option<i64>,
    recover_dst_replica_ranks: Vec<i64>,
    /// The store at which the ranks with this group rank meet, `host:port`.
    store_address: String,
    max_step: i64,
    /// This group's position among those at `max_step`; None if it is behind.
    max_replica_rank: Option<i64>,
    max_world_size: i64,
    heal: bool,
    /// The most discarded steps in a row of any member.
    commit_failures: i64,
    /// All members' names, by replica rank.
    replica_ids: Vec<String>,
    /// Those that heal in this quorum: the same list for all groups.
    recovering_replica_ranks: Vec<i64>,
    /// Those that asked with `init_sync`.
    fresh_replica_ranks: Vec<i64>,
    /// Those that end their run.
    settling_replica_ranks: Vec<i64>,
    /// Ranks in each group, by replica rank.
    world_sizes: Vec<u64>,
}

#[pymethods]
impl QuorumResult {
    #[new]
    fn new() -> Self {
        Self {
            quorum_id: 0,
            replica_rank: 0,
            replica_world_size: 1,
            recover_src_manager_address: String::new(),
            recover_src_replica_rank: None,
            recover_dst_replica_ranks: Vec::new(),
            store_address: String::new(),
            max_step: 0,
            max_replica_rank: None,
            max_world_size: 1,
            heal: false,
            commit_failures: 0,
            replica_ids: Vec::new(),
            recovering_replica_ranks: Vec::new(),
            fresh_replica_ranks: Vec::new(),
            settling_replica_ranks: Vec::new(),
            world_sizes: Vec::new(),
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "QuorumResult(quorum_id={}, replica_rank={}, replica_world_size={}, max_step={}, \
             heal={}, replica_ids={:?}, recovering_replica_ranks={:?})",
            self.quorum_id,
            self.replica_rank,
            self.replica_world_size,
            self.max_step,
            if self.heal { "True" } else { "False" },
            self.replica_ids,
            self.recovering_replica_ranks,
        )
    }
}

impl From<wire::ManagerQuorumResponse> for QuorumResult {
    fn from(told: wire::ManagerQuorumResponse) -> Self {
        Self {
            quorum_id: told.quorum_id,
            replica_rank: told.replica_rank,
            replica_world_size: told.replica_world_size,
            recover_src_manager_address: told.recover_src_manager_address,
            recover_src_replica_rank: told.recover_src_replica_rank,
            recover_dst_replica_ranks: told.recover_dst_replica_ranks,
            store_address: told.store_address,
            max_step: told.max_step,
            max_replica_rank: told.max_replica_rank,
            max_world_size: told.max_world_size,
            heal: told.heal,
            commit_failures: told.commit_failures,
            replica_ids: told.replica_ids,
            recovering_replica_ranks: told.recovering_replica_ranks,
            fresh_replica_ranks: told.fresh_replica_ranks,
            settling_replica_ranks: told.settling_replica_ranks,
            world_sizes: told.world_sizes,
        }
    }
}
