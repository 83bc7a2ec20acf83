//! The lighthouse and the manager server, their clients, and what they have in common.
//!
//! A handler converts, calls the core, and carries out what the core decided: sockets, clocks and
//! locks are here, decisions are in `torchft-quorum`.

pub mod address;
pub mod clock;
pub mod connection;
pub mod deadline;
pub mod error;
pub mod lighthouse;
pub mod listen;
pub mod lock;
pub mod log;
pub mod manager;
pub mod options;
pub mod pending;
pub mod process;
pub mod serve;
pub mod timer;
pub mod version;
pub mod wire;
