//! The decisions of the control plane, without clock, socket, async or lock.
//!
//! Events and the time go in, effects with their reasons come out; a shell carries the effects out.
//! Time is a [`std::time::Duration`] since an origin that the shell chooses; it never runs
//! backwards. Each question has its own module:
//!
//! | module | question | who asks |
//! |---|---|---|
//! | [`machine`] | who takes part in the next step, and under which quorum id? | lighthouse |
//! | [`decide`] | may a quorum form now, and if not, why? | `machine` |
//! | [`assign`] | which rank has a group in a quorum, and who heals from whom? | manager server |
//! | [`gather`] | what does a group ask for, when all its local ranks have asked? | manager server |
//! | [`vote`] | do all ranks of a group commit this step? | manager server |

pub mod assign;
pub mod decide;
pub mod effect;
pub mod gather;
mod gather_error;
pub mod machine;
pub mod member;
mod roster;
pub mod rules;
pub mod status;
pub mod vote;
pub mod waiting;
