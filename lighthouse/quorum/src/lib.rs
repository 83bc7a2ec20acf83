//! The decisions of the control plane, without clock, socket, async or lock.
//!
//! Events and the time go in, effects with their reasons come out; a server carries the effects out.
//! Time is a [`std::time::Duration`] since an origin that the server chooses; it never runs
//! backwards. Each question has its own module:
//!
//! | module | question | who asks |
//! |---|---|---|
//! | [`coordinator`] | who takes part in the next step, and under which quorum id? | lighthouse |
//! | [`decide`] | may a quorum form now, and if not, why? | `coordinator` |
//! | [`assign`] | which rank has a group in a quorum, and who heals from whom? | manager server |
//! | [`gather`] | what does a group ask for, when all its local ranks have asked? | manager server |
//! | [`vote`] | do all ranks of a group commit this step? | manager server |
//!
//! # Invariants
//!
//! `tests/lighthouse_properties.rs` and `tests/group_properties.rs` check random schedules against
//! these; `tests/testdata/*.txt` have the situations one by one.
//!
//! Of the lighthouse, whatever happens:
//! - Quorum ids rise. One is used again only by the very same members, none of which has discarded
//!   a step, as long as the lighthouse lives; after a restart all are higher.
//! - A quorum has at least `min_replicas` members. Each of them asked, and is healthy.
//! - While a healthy member asks `shrink_only`, every member was in the last quorum.
//! - No group that sends heartbeats is left out before the join timeout has passed for a majority,
//!   unless all members of the last quorum ask.
//! - A step that a quorum had reached is given up only if none of its healthy members is left out,
//!   with one warning, and never by groups alone that had to heal to it.
//! - Every call gets exactly one answer, or leaves.
//! - When all healthy ids ask, or a majority of them and the join timeout has passed, and neither
//!   `min_replicas`, `shrink_only` nor the step of the last quorum stands against it, nobody waits.
//! - Time alone changes nothing before [`coordinator::Coordinator::next_wake`].
//! - When all groups are gone, only the last quorum is remembered.
//!
//! Of the parts in a quorum:
//! - All groups compute the same list of groups that heal. Every group behind the highest step is on
//!   it, and at least one group is not.
//! - A group that heals has one donor, which does not heal itself, and which knows of it.
//! - At step 0 a new group overwrites no group that has trained.
//!
//! Of a group:
//! - It has at most one request at the lighthouse. The request has the lowest step of the ranks, and
//!   ends, with all its retries, before the first of its callers gives up.
//! - A late answer has no effect. When a caller leaves, all other callers are answered at once.
//! - All callers of one barrier get the same answer: yes only if every rank voted yes, on one step.
//! - No vote outlives its caller, its step or its round.

pub mod assign;
pub mod coordinator;
pub mod decide;
pub mod effect;
pub mod gather;
mod gather_error;
pub mod member;
mod replicas;
pub mod rules;
pub mod status;
pub mod vote;
pub mod waiting;
