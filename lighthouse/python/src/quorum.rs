//! `Quorum` and its parts, as plain values. A member becomes a Python object when it is read.

use std::sync::Arc;

use pyo3::prelude::*;
use torchft_server::wire;

use crate::json;

/// The replica groups that take part in a step.
///
/// Args:
///     Not constructible: it comes from `LighthouseClient.quorum`.
#[pyclass(frozen, module = "torchft._torchft")]
pub struct Quorum {
    /// Rises whenever the process groups must be rebuilt.
    #[pyo3(get)]
    quorum_id: i64,
    created: Timestamp,
    members: Vec<Arc<wire::QuorumMember>>,
}

#[pymethods]
impl Quorum {
    /// The members, sorted by replica id: the index is the replica rank.
    #[getter]
    fn participants(&self) -> Vec<QuorumMember> {
        self.members
            .iter()
            .map(|m| QuorumMember(m.clone()))
            .collect()
    }

    /// When it was decided, on the lighthouse's clock.
    #[getter]
    fn created(&self) -> Timestamp {
        self.created
    }

    fn __repr__(&self) -> String {
        let ids: Vec<&str> = self.members.iter().map(|m| m.replica_id.as_str()).collect();
        format!("Quorum(quorum_id={}, participants={ids:?})", self.quorum_id)
    }
}

impl From<wire::Quorum> for Quorum {
    fn from(quorum: wire::Quorum) -> Self {
        let created = quorum.created.unwrap_or_default();
        Self {
            quorum_id: quorum.quorum_id,
            created: Timestamp {
                seconds: created.seconds,
                nanos: created.nanos,
            },
            members: quorum.participants.into_iter().map(Arc::new).collect(),
        }
    }
}

/// One member of a quorum, as it asked.
///
/// Args:
///     Not constructible: it comes from `Quorum.participants`.
#[pyclass(frozen, module = "torchft._torchft")]
pub struct QuorumMember(Arc<wire::QuorumMember>);

#[pymethods]
impl QuorumMember {
    /// The group's name, with a suffix that is fresh for each start.
    #[getter]
    fn replica_id(&self) -> &str {
        &self.0.replica_id
    }

    /// Its manager server, `http://host:port`.
    #[getter]
    fn address(&self) -> &str {
        &self.0.address
    }

    /// Its rendezvous store, `host:port`.
    #[getter]
    fn store_address(&self) -> &str {
        &self.0.store_address
    }

    /// The last step it committed.
    #[getter]
    fn step(&self) -> i64 {
        self.0.step
    }

    /// Ranks in the group.
    #[getter]
    fn world_size(&self) -> u64 {
        self.0.world_size
    }

    /// Whether it asked for a quorum without new members.
    #[getter]
    fn shrink_only(&self) -> bool {
        self.0.shrink_only
    }

    /// Steps it discarded in a row.
    #[getter]
    fn commit_failures(&self) -> i64 {
        self.0.commit_failures
    }

    /// The user's data that it sent, or `None`.
    #[getter]
    fn data(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        json::read(py, &self.0.data)
    }

    fn __repr__(&self) -> String {
        format!(
            "QuorumMember(replica_id={:?}, step={})",
            self.0.replica_id, self.0.step
        )
    }
}

/// A moment, as the time since 1970.
///
/// Args:
///     Not constructible: it comes from `Quorum.created`.
#[pyclass(frozen, get_all, module = "torchft._torchft")]
#[derive(Clone, Copy)]
pub struct Timestamp {
    /// Whole seconds.
    seconds: i64,
    /// Nanoseconds beyond them.
    nanos: i32,
}

#[pymethods]
impl Timestamp {
    fn __repr__(&self) -> String {
        format!("Timestamp(seconds={}, nanos={})", self.seconds, self.nanos)
    }
}
