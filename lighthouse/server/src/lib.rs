//! The shells around the quorum core: the lighthouse, the manager server and their clients.
//!
//! A handler converts, calls the core, and carries out what the core decided; sockets, clocks and
//! locks are here, decisions are in `torchft-quorum`.

pub mod address;
pub mod alarm;
pub mod clock;
pub mod convert;
pub mod deadline;
pub mod error;
pub mod lighthouse;
pub mod link;
pub mod listen;
pub mod log;
pub mod manager;
pub mod options;
pub mod process;
pub mod serve;
pub mod version;
pub mod wire;
