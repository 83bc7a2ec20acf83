//! `LighthouseServer` and `LighthouseClient`.

use std::{sync::Arc, time::Duration};

use pyo3::{prelude::*, types::PyDict};
use torchft_server::{
    lighthouse::{Lighthouse, LighthouseClient as Client},
    options::LighthouseOptions,
    wire,
};

use crate::{errors, forked::OneProcess, host, json, quorum::Quorum, runtime};

/// Runs a lighthouse inside this process.
///
/// Args:
///     bind: address to listen on, `host:port`; port 0 takes a free one.
///     min_replicas: fewest replica groups that may form a quorum, at least 1.
///     join_timeout_ms: how long a quorum waits for groups that are alive but have not asked.
///     quorum_tick_ms: accepted for existing callers, without effect: decisions are taken at once.
///     heartbeat_timeout_ms: a group that has sent no heartbeat for this long counts as dead.
///
/// Raises:
///     SettingsError: a value that cannot be used, or a port that is taken.
#[pyclass(frozen, module = "torchft._torchft")]
pub struct LighthouseServer(OneProcess<Server>);

struct Server(Arc<Lighthouse>);

#[pymethods]
impl LighthouseServer {
    #[new]
    #[pyo3(signature = (bind, min_replicas, join_timeout_ms=100, quorum_tick_ms=100,
                        heartbeat_timeout_ms=5000))]
    fn new(
        py: Python<'_>,
        bind: String,
        min_replicas: i64,
        join_timeout_ms: i64,
        quorum_tick_ms: i64,
        heartbeat_timeout_ms: i64,
    ) -> PyResult<Self> {
        let options = LighthouseOptions::checked(
            bind,
            min_replicas,
            join_timeout_ms,
            quorum_tick_ms,
            heartbeat_timeout_ms,
        )
        .map_err(|error| errors::settings(py, error))?;
        let host_name = host::name(py)?;
        let started = runtime::wait(py, Lighthouse::start(options, &host_name))?;
        let lighthouse = started.map_err(|error| errors::settings(py, error))?;
        Ok(Self(OneProcess::new(
            "LighthouseServer",
            Server(Arc::new(lighthouse)),
        )))
    }

    /// The address that managers and clients dial.
    ///
    /// Returns:
    ///     `http://host:port`. The host is the one that was bound, or the name of this host if that
    ///     is a wildcard.
    fn address(&self) -> PyResult<&str> {
        Ok(self.0.get()?.0.address())
    }

    /// Fails all pending calls and closes the port. A second call does nothing.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        let lighthouse = self.0.get()?.0.clone();
        runtime::wait(py, async move { lighthouse.stop().await })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let lighthouse = self.0.clone();
        runtime::spawn(async move { lighthouse.stop().await });
    }
}

/// A client of a lighthouse.
///
/// Args:
///     addr: the lighthouse, `http://host:port`.
///     connect_timeout: how long the first connection may take, with retries.
///
/// Raises:
///     SettingsError: the address has another form.
///     UnreachableError: no connection within `connect_timeout`; also a `TimeoutError`.
#[pyclass(frozen, module = "torchft._torchft")]
pub struct LighthouseClient(OneProcess<Client>);

#[pymethods]
impl LighthouseClient {
    #[new]
    fn new(py: Python<'_>, addr: &str, connect_timeout: Duration) -> PyResult<Self> {
        let client = runtime::wait(py, Client::connect(addr, connect_timeout))?;
        let client = client.map_err(|error| errors::raise(py, &error))?;
        Ok(Self(OneProcess::new("LighthouseClient", client)))
    }

    /// Asks for a quorum as the replica group `replica_id`, and waits for it.
    ///
    /// Args:
    ///     replica_id: the group's name in the quorum.
    ///     timeout: how long to wait.
    ///     address: the group's manager server, `http://host:port`.
    ///     store_address: the group's rendezvous store, `host:port`.
    ///     step: the last step that the group committed.
    ///     world_size: ranks in the group.
    ///     shrink_only: admit no group that was not in the last quorum.
    ///     data: anything that JSON can hold; every member receives it.
    ///
    /// Returns:
    ///     The quorum, with this group in it.
    ///
    /// Raises:
    ///     TimeoutError: no quorum in time; the message says what it waited for.
    ///     StateLostError: all groups that held the state this group was to heal to are gone.
    ///     TorchftError: anything else, a `RuntimeError`.
    #[pyo3(signature = (replica_id, timeout, address="".to_owned(), store_address="".to_owned(),
                        step=0, world_size=0, shrink_only=false, data=None))]
    #[allow(clippy::too_many_arguments)] // the signature that existing callers know
    fn quorum(
        &self,
        py: Python<'_>,
        replica_id: String,
        timeout: Duration,
        address: String,
        store_address: String,
        step: i64,
        world_size: u64,
        shrink_only: bool,
        data: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Quorum> {
        let client = self.0.get()?;
        let requester = wire::QuorumMember {
            replica_id,
            address,
            store_address,
            step,
            world_size,
            shrink_only,
            data: json::write(py, data)?,
            commit_failures: 0,
            init_sync: None,
            settling: false,
            reconfigure_handles: Vec::new(),
        };
        let quorum = runtime::wait(py, client.quorum(requester, 0, timeout))?;
        let quorum = quorum.map_err(|error| errors::raise(py, &error))?;
        Ok(quorum.into())
    }

    /// Sends a heartbeat: the replica group `replica_id` is alive.
    ///
    /// Args:
    ///     replica_id: the group's name.
    ///     timeout: how long to wait for the reply.
    ///
    /// Raises:
    ///     TimeoutError: no reply in time.
    ///     TorchftError: the lighthouse cannot be reached, a `RuntimeError`.
    #[pyo3(signature = (replica_id, timeout=Duration::from_secs(5)))]
    fn heartbeat(&self, py: Python<'_>, replica_id: &str, timeout: Duration) -> PyResult<()> {
        let client = self.0.get()?;
        let reply = runtime::wait(py, client.heartbeat(replica_id, timeout))?;
        reply.map_err(|error| errors::raise(py, &error))
    }
}
