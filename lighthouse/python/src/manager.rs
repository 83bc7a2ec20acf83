//! `ManagerServer`, `ManagerClient` and what the latter returns.

use std::{sync::Arc, time::Duration};

use pyo3::prelude::*;
use torchft_quorum::vote::Ballot;
use torchft_server::{
    manager::{Manager, ManagerClient as Client, ManagerOptions, StartError},
    process, wire,
};

use crate::{errors, forked::OneProcess, result::QuorumResult, runtime};

/// The manager server of a replica group, inside the process of its rank 0.
///
/// It gathers the group's ranks, asks the lighthouse for them, and says that the group is alive.
///
/// Args:
///     replica_id: the group's name in the quorum.
///     lighthouse_addr: the lighthouse, `http://host:port`.
///     hostname: the name of this machine for others.
///     bind: address to listen on, `host:port`; port 0 takes a free one.
///     store_addr: the group's rendezvous store, `host:port`.
///     world_size: ranks in the group, at least 1.
///     heartbeat_interval: how often the group says that it is alive, above 0.
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

    /// The address that ranks and peers dial, `http://host:port`.
    fn address(&self) -> PyResult<&str> {
        Ok(self.0.get()?.0.address())
    }

    /// Sends everybody away, stops the heartbeat and closes the port. A second call does nothing.
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
    ///     shrink_only: take nobody in who was not in the last quorum.
    ///     init_sync: this process has not been in a quorum yet and wants the primary's state.
    ///     commit_failures: steps it discarded in a row; above 0 asks for new process groups.
    ///     timeout: how long to wait.
    ///     settling: this group ends its run, and asks only for those that are behind.
    ///
    /// Raises:
    ///     UnreachableError: the lighthouse has not answered in time; also a `TimeoutError`.
    ///     TimeoutError: no quorum in time; says which rank or replica was waited for.
    ///     StateLostError: those who held the state that this group was to heal to are gone.
    ///     QuorumError: refused for another reason, such as a rank of the group that left.
    #[pyo3(signature = (group_rank, step, checkpoint_metadata, shrink_only, init_sync, commit_failures, timeout, settling=false))]
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
        };
        let told = runtime::wait(py, self.0.get()?.quorum(message, timeout))?;
        let told = told.map_err(|error| errors::raise(py, &error))?;
        Ok(told.into())
    }

    /// Where the state of `rank` of that group can be fetched, as that rank said.
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
        let ballot = Ballot {
            group_rank,
            step,
            commit: should_commit,
        };
        let outcome = runtime::wait(py, self.0.get()?.should_commit(ballot, timeout))?;
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
        let told = runtime::wait(py, self.0.get()?.end_group(group_rank, why, timeout))?;
        told.map_err(|error| errors::raise(py, &error))
    }
}
