//! Which rank a group has in a quorum, which store its ranks meet at, and who heals from whom.
//!
//! Every group computes this from the same quorum, so that all agree without further messages:
//!
//! - A replica's rank is its position in the quorum.
//! - Those at the highest step are *ahead*; all others heal.
//! - At step 0 nobody is ahead, but initial weights may differ: there the *fresh* groups, which ask
//!   with `init_sync`, heal too, all but the primary. The primary is a member that is not fresh, if
//!   there is one: a new group never overwrites the weights of groups that have trained.
//! - The `i`-th that heals gets its state from the `(i + group_rank + f)`-th that does not, where `f` is how
//!   many steps it has discarded in a row: the ranks of a group load different donors, and a group
//!   whose heal failed asks another one.
//! - Ranks of equal group rank meet at the store of the `group_rank`-th that is ahead.

use thiserror::Error;

use crate::member::{Handle, Member, Quorum, ReplicaId};

/// What one rank of one group has to do in a quorum. Replica ranks are positions in the quorum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The quorum's id.
    pub quorum_id: i64,
    /// This group's rank.
    pub replica_rank: i64,
    /// Groups in the quorum.
    pub replica_world_size: i64,
    /// All names in rank order.
    pub replica_ids: Vec<ReplicaId>,
    /// The highest step.
    pub max_step: i64,
    /// This group's position among those at the highest step; `None` if it is behind.
    pub max_replica_rank: Option<i64>,
    /// Groups at the highest step.
    pub max_world_size: i64,
    /// The rendezvous store at which all groups' ranks with this group rank meet.
    pub store_address: String,
    /// The donor from which this group heals; `None` if it does not heal.
    pub source: Option<Source>,
    /// Replica ranks that heal from this group.
    pub recover_dst_replica_ranks: Vec<i64>,
    /// Replica ranks that heal in this quorum: the same list for all groups.
    pub recovering_replica_ranks: Vec<i64>,
    /// Replica ranks that asked with `init_sync`.
    pub fresh_replica_ranks: Vec<i64>,
    /// Replica ranks that end their run: the final sync.
    pub final_sync_replica_ranks: Vec<i64>,
    /// Ranks in each group, in rank order.
    pub world_sizes: Vec<u64>,
    /// The most discarded steps in a row of any member.
    pub commit_failures: i64,
    /// The handles of the ranks with this group rank, in rank order.
    pub handles: Vec<Handle>,
}

/// A donor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its rank.
    pub replica_rank: i64,
    /// Its manager server.
    pub manager_address: String,
}

/// The replica is not a member of the quorum.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("replica {replica_id} is not in quorum {quorum_id}: ask for the next one")]
pub struct NotInQuorum {
    /// The replica that asked.
    pub replica_id: ReplicaId,
    /// The quorum.
    pub quorum_id: i64,
}

/// Returns what the rank `group_rank` of `replica_id` has to do in `quorum`. `init_sync` is what that
/// rank asked for; it is used for members that do not say.
pub fn assign(
    quorum: &Quorum,
    replica_id: &str,
    group_rank: i64,
    init_sync: bool,
) -> Result<Assignment, NotInQuorum> {
    let own = quorum
        .replica_ids()
        .position(|id| id.as_str() == replica_id);
    let own = own.ok_or_else(|| NotInQuorum {
        replica_id: replica_id.into(),
        quorum_id: quorum.id,
    })?;
    let roles = Roles::of(quorum, group_rank, init_sync);
    let donor = |(i, to): (usize, &usize)| {
        let tries = quorum.members[*to].commit_failures;
        *around(
            &roles.donors,
            group_rank.wrapping_add(i as i64).wrapping_add(tries),
        )
    };
    let pairs = roles.healing.iter().enumerate();
    let pairs = pairs.map(|pair| (*pair.1, donor(pair)));
    let source = pairs.clone().find(|(to, _)| *to == own);
    let fresh = indices(quorum, |_, m| m.is_fresh());
    let final_sync = indices(quorum, |_, m| m.final_sync);
    let failures = quorum.members.iter().map(|m| m.commit_failures);
    let first = *around(&roles.ahead, group_rank);
    Ok(Assignment {
        quorum_id: quorum.id,
        replica_rank: own as i64,
        replica_world_size: quorum.members.len() as i64,
        replica_ids: quorum.replica_ids().cloned().collect(),
        max_step: quorum.max_step(),
        max_replica_rank: position(&roles.ahead, own),
        max_world_size: roles.ahead.len() as i64,
        store_address: quorum.members[first].store_address.clone(),
        source: source.map(|(_, donor)| Source {
            replica_rank: donor as i64,
            manager_address: quorum.members[donor].address.clone(),
        }),
        recover_dst_replica_ranks: ranks(pairs.filter(|(_, from)| *from == own).map(|(to, _)| to)),
        recovering_replica_ranks: ranks(roles.healing.iter().copied()),
        fresh_replica_ranks: ranks(fresh.into_iter()),
        final_sync_replica_ranks: ranks(final_sync.into_iter()),
        world_sizes: quorum.members.iter().map(|m| m.world_size).collect(),
        commit_failures: failures.max().unwrap_or(0),
        handles: quorum
            .members
            .iter()
            .map(|m| m.handle(group_rank))
            .collect(),
    })
}

/// The roles in a quorum, as sorted indices into its members.
struct Roles {
    /// At the highest step. Never empty.
    ahead: Vec<usize>,
    /// Those that heal.
    healing: Vec<usize>,
    /// All others. Never empty.
    donors: Vec<usize>,
}

impl Roles {
    fn of(quorum: &Quorum, group_rank: i64, init_sync: bool) -> Self {
        let max_step = quorum.max_step();
        let ahead = indices(quorum, |_, m| m.step == max_step);
        let is_forced = |m: &Member| max_step == 0 && m.init_sync.unwrap_or(init_sync);
        let initialized = indices(quorum, |_, m| m.step == max_step && !is_forced(m));
        let pool = if initialized.is_empty() {
            &ahead
        } else {
            &initialized
        };
        let primary = *around(pool, group_rank);
        let heals = |i: usize, m: &Member| m.step < max_step || (is_forced(m) && i != primary);
        let healing = indices(quorum, heals);
        let donors = indices(quorum, |i, m| !heals(i, m));
        Self {
            ahead,
            healing,
            donors,
        }
    }
}

fn indices(quorum: &Quorum, is: impl Fn(usize, &Member) -> bool) -> Vec<usize> {
    let all = quorum.members.iter().enumerate();
    all.filter(|(i, m)| is(*i, m)).map(|(i, _)| i).collect()
}

/// The `i`-th item of a list that is not empty; counting goes on at its start.
fn around(list: &[usize], i: i64) -> &usize {
    &list[i.rem_euclid(list.len() as i64) as usize]
}

fn position(list: &[usize], of: usize) -> Option<i64> {
    list.binary_search(&of).ok().map(|i| i as i64)
}

fn ranks(indices: impl Iterator<Item = usize>) -> Vec<i64> {
    indices.map(|i| i as i64).collect()
}
