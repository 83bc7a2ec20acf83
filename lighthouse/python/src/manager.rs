//! `ManagerServer`, `ManagerClient`, and the `QuorumResult` that a client returns.

use std::{sync::Arc, time::Duration};

use pyo3::prelude::*;
use torchft_quorum::vote::RankVote;
use torchft_server::{
    manager::{Manager, ManagerClient as Client, ManagerOptions, StartError},
    process, wire,
};

use crate::{errors, forked::OneProcess, runtime};

/// The manager server of a replica group, inside the process of its rank 0.
///
/// It gathers the group's ranks, asks the lighthouse for them, and says that the group is alive.
///
/// Args:
///     replica_id: the group's name in the quorum.
///     lighthouse_addr: the lighthouse, `http://host:port`.
///     hostname: the name under which other hosts reach this one.
///     bind: address to listen on, `host:port`; port 0 takes a free one.
///     store_addr: the group's rendezvous store, `host:port`.
///     world_size: ranks in the group, at least 1.
///     heartbeat_interval: how often the group sends a heartbeat, above 0.
///     connect_timeout: how long the first connection to the lighthouse may take.
///     quorum_retries: how often a request that the lighthouse failed is sent again. One that did
///         not reach it is sent again until its callers' deadline, whatever this says.
///
/// Raises:
///     SettingsError: a value that cannot be used, or a port that is taken.
///     UnreachableError: no connection to the lighthouse in time; also a `TimeoutError`.
#[pyclass(frozen, module = "torchft._torchft")]
pub struct ManagerServer(OneProcess<Server>);

struct Server(Arc<Manager>);

#[pymethods]
impl ManagerServer {
    #[new]
    #[allow(clippy::too_many_arguments)] // the signature that existing callers know
    fn new(
        py: Python<'_>,
        replica_id: String,
        lighthouse_addr: String,
        hostname: String,
        bind: String,
        store_addr: String,
        world_size: u64,
        heartbeat_interval: Duration,
        connect_timeout: Duration,
        quorum_retries: i64,
    ) -> PyResult<Self> {
        let quorum_retries = u32::try_from(quorum_retries).map_err(|_| {
            let range = "must be from 0 to 4294967295";
            errors::settings(
                py,
                format!("quorum_retries is {quorum_retries}, but {range}"),
            )
        })?;
        let options = ManagerOptions {
            replica_id,
            lighthouse_address: lighthouse_addr,
            host_name: hostname,
            bind,
            store_address: store_addr,
            world_size,
            heartbeat_interval,
            connect_timeout,
            quorum_retries,
            kill: |why| process::end_process(1, why),
        };
        let manager = runtime::wait(py, Manager::start(options))?.map_err(|error| match error {
            StartError::Lighthouse(error) => errors::raise(py, &error),
            error => errors::settings(py, error),
        })?;
        Ok(Self(OneProcess::new(
            "ManagerServer",
            Server(Arc::new(manager)),
        )))
    }

    /// The address that ranks and other groups dial, `http://host:port`.
    fn address(&self) -> PyResult<&str> {
        Ok(self.0.get()?.0.address())
    }

    /// Fails all pending calls, stops the heartbeats and closes the port. A second call does nothing.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        let manager = self.0.get()?.0.clone();
        runtime::wait(py, async move { manager.stop().await })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let manager = self.0.clone();
        runtime::spawn(async move { manager.stop().await });
    }
}

/// One rank's client of a manager server. A server of the same process is called directly.
///
/// Args:
///     addr: the manager server, `http://host:port`.
///     connect_timeout: how long the first connection may take, with retries.
///
/// Raises:
///     SettingsError: the address has another form.
///     UnreachableError: no connection within `connect_timeout`; also a `TimeoutError`.
#[pyclass(frozen, module = "torchft._torchft")]
pub struct ManagerClient(OneProcess<Client>);

#[pymethods]
impl ManagerClient {
    #[new]
    fn new(py: Python<'_>, addr: &str, connect_timeout: Duration) -> PyResult<Self> {
        let client = runtime::wait(py, Client::connect(addr, connect_timeout))?;
        let client = client.map_err(|error| errors::raise(py, &error))?;
        Ok(Self(OneProcess::new("ManagerClient", client)))
    }

    /// Asks for a quorum, together with all other ranks of the group.
    ///
    /// Args:
    ///     group_rank: which rank asks.
    ///     step: the last step it committed.
    ///     checkpoint_metadata: where its state can be fetched; opaque.
    ///     shrink_only: admit no group that was not in the last quorum.
    ///     init_sync: this process has not been in a quorum yet and needs initial weights.
    ///     commit_failures: steps it discarded in a row; above 0 asks for new process groups.
    ///     timeout: how long to wait.
    ///     reconfigure_handle: where this rank's process group can be met; passed on unread.
    ///     settling: the final sync: this group ends its run, and asks only for groups that are behind.
    ///
    /// Raises:
    ///     UnreachableError: the lighthouse has not answered in time; also a `TimeoutError`.
    ///     TimeoutError: no quorum in time; the message names the rank or replica it waited for.
    ///     StateLostError: all groups that held the state this group was to heal to are gone.
    ///     QuorumError: refused for another reason, such as a rank of the group that stopped waiting.
    #[pyo3(signature = (group_rank, step, checkpoint_metadata, shrink_only, init_sync, commit_failures, timeout, reconfigure_handle=String::new(), settling=false))]
    #[allow(clippy::too_many_arguments)] // the signature that existing callers know
    fn _quorum(
        &self,
        py: Python<'_>,
        group_rank: i64,
        step: i64,
        checkpoint_metadata: String,
        shrink_only: bool,
        init_sync: bool,
        commit_failures: i64,
        timeout: Duration,
        reconfigure_handle: String,
        settling: bool,
    ) -> PyResult<QuorumResult> {
        let message = wire::ManagerQuorumRequest {
            group_rank,
            step,
            checkpoint_metadata,
            shrink_only,
            init_sync,
            commit_failures,
            settling,
            reconfigure_handle,
        };
        let response = runtime::wait(py, self.0.get()?.quorum(message, timeout))?;
        let response = response.map_err(|error| errors::raise(py, &error))?;
        Ok(response.into())
    }

    /// Returns where the state of `rank` of that group can be fetched, as that rank said.
    ///
    /// Args:
    ///     rank: the group rank.
    ///     timeout: how long to wait.
    ///
    /// Raises:
    ///     TimeoutError: no answer in time.
    ///     TorchftError: that rank has not asked for a quorum yet; a `RuntimeError`.
    fn _checkpoint_metadata(
        &self,
        py: Python<'_>,
        rank: i64,
        timeout: Duration,
    ) -> PyResult<String> {
        let found = runtime::wait(py, self.0.get()?.checkpoint_metadata(rank, timeout))?;
        found.map_err(|error| errors::raise(py, &error))
    }

    /// Votes on a step, and waits for all other ranks of the group.
    ///
    /// Args:
    ///     group_rank: which rank votes.
    ///     step: the step it wants to commit.
    ///     should_commit: its vote.
    ///     timeout: how long to wait.
    ///
    /// Returns:
    ///     Whether every rank of the group voted yes.
    ///
    /// Raises:
    ///     TimeoutError: a rank did not vote in time; says which.
    ///     MismatchError: the ranks voted on different steps.
    fn should_commit(
        &self,
        py: Python<'_>,
        group_rank: i64,
        step: i64,
        should_commit: bool,
        timeout: Duration,
    ) -> PyResult<bool> {
        let vote = RankVote {
            group_rank,
            step,
            commit: should_commit,
        };
        let outcome = runtime::wait(py, self.0.get()?.should_commit(vote, timeout))?;
        outcome.map_err(|error| errors::raise(py, &error))
    }

    /// Says that this rank cannot go on: all other ranks get a `QuorumError` with the reason, now
    /// or when they next ask for a quorum or vote.
    ///
    /// Args:
    ///     group_rank: which rank ends.
    ///     why: the reason, not empty.
    ///     timeout: how long to wait.
    ///
    /// Raises:
    ///     TimeoutError: no answer in time.
    fn _end_group(
        &self,
        py: Python<'_>,
        group_rank: i64,
        why: &str,
        timeout: Duration,
    ) -> PyResult<()> {
        let response = runtime::wait(py, self.0.get()?.end_group(group_rank, why, timeout))?;
        response.map_err(|error| errors::raise(py, &error))
    }
}

/// What one rank is told about a quorum. Replica ranks are positions in the quorum.
///
/// Args:
///     None: it starts as a quorum of one, and every field can be set (tests do).
#[pyclass(get_all, set_all, module = "torchft._torchft")]
#[derive(Default)]
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
    /// Where the process groups of the ranks with this group rank can be met, by replica rank; empty
    /// for a member that does not say.
    reconfigure_handles: Vec<String>,
    /// Those that heal in this quorum: the same list for all groups.
    recovering_replica_ranks: Vec<i64>,
    /// Those that asked with `init_sync`.
    fresh_replica_ranks: Vec<i64>,
    /// Those that end their run: the final sync.
    settling_replica_ranks: Vec<i64>,
    /// Ranks in each group, by replica rank.
    world_sizes: Vec<u64>,
}

#[pymethods]
impl QuorumResult {
    #[new]
    fn new() -> Self {
        Self {
            replica_world_size: 1,
            max_world_size: 1,
            ..Self::default()
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
    fn from(response: wire::ManagerQuorumResponse) -> Self {
        Self {
            quorum_id: response.quorum_id,
            replica_rank: response.replica_rank,
            replica_world_size: response.replica_world_size,
            recover_src_manager_address: response.recover_src_manager_address,
            recover_src_replica_rank: response.recover_src_replica_rank,
            recover_dst_replica_ranks: response.recover_dst_replica_ranks,
            store_address: response.store_address,
            max_step: response.max_step,
            max_replica_rank: response.max_replica_rank,
            max_world_size: response.max_world_size,
            heal: response.heal,
            commit_failures: response.commit_failures,
            replica_ids: response.replica_ids,
            reconfigure_handles: response.reconfigure_handles,
            recovering_replica_ranks: response.recovering_replica_ranks,
            fresh_replica_ranks: response.fresh_replica_ranks,
            settling_replica_ranks: response.settling_replica_ranks,
            world_sizes: response.world_sizes,
        }
    }
}
