//! Who is alive and who asks, with the counts that a decision needs always up to date.
//!
//! An event touches one replica; only a new quorum visits all of them. Each replica has a time at
//! which it is checked next. A heartbeat does not move that time: the check looks when the last
//! heartbeat came. A replica is forgotten when it was silent for [`Rules::forget_after`], does not
//! ask, and is not in the last quorum, so the memory is bounded by who was heard lately.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::decide::Counts;
use crate::member::{CallId, Generation, Member, Quorum, ReplicaId};
use crate::rules::Rules;

/// One replica that is remembered.
#[derive(Debug)]
pub(crate) struct Replica {
    /// When it was last heard.
    pub(crate) heard: Duration,
    /// Heard less than the heartbeat timeout ago.
    pub(crate) healthy: bool,
    /// Its request, while it has one.
    pub(crate) asking: Option<Asking>,
    /// What it had to do in the last quorum, if it was a member.
    pub(crate) last_role: Option<LastRole>,
    /// Whose managers it runs, as its latest request shows.
    pub(crate) generation: Option<Generation>,
    /// It runs another generation than the job: it is not counted, and its request waits.
    pub(crate) held_back: bool,
    /// When it is checked next; its entry in [`Replicas::checks`].
    check_at: Duration,
}

/// A request that waits.
#[derive(Debug)]
pub(crate) struct Asking {
    pub(crate) call_id: CallId,
    pub(crate) member: Arc<Member>,
    /// Since when it waits for the quorum that is forming now.
    since: Duration,
    /// The lighthouse did not run for a part of that time.
    pub(crate) paused: bool,
}

/// The role of a member in the last quorum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastRole {
    /// It was at the highest step.
    UpToDate,
    /// It was behind and was told to heal.
    Healing,
}

/// All replicas that are remembered.
#[derive(Debug)]
pub(crate) struct Replicas {
    rules: Rules,
    by_id: BTreeMap<ReplicaId, Replica>,
    callers: HashMap<CallId, ReplicaId>,
    checks: BTreeSet<(Duration, ReplicaId)>,
    /// The healthy replicas that ask, the longest waiting first.
    queue: BTreeSet<(Duration, ReplicaId)>,
    counts: Counts,
    /// The generation of which quorums are formed; `None` before the first request that shows one.
    job: Option<Generation>,
    visits: u64,
}

impl Replicas {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            by_id: BTreeMap::new(),
            callers: HashMap::new(),
            checks: BTreeSet::new(),
            queue: BTreeSet::new(),
            counts: Counts::default(),
            job: None,
            visits: 0,
        }
    }

    /// The counts as of the last event.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            first_asked: self.queue.first().map(|(since, _)| *since),
            ..self.counts
        }
    }

    /// All replicas, sorted by id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ReplicaId, &Replica)> {
        self.by_id.iter()
    }

    /// The generation of which quorums are formed.
    pub(crate) fn job(&self) -> Option<Generation> {
        self.job
    }

    /// Forms quorums of another generation from now on, if of the present one fewer than
    /// `min_replicas` are healthy, and of the other at least as many ask. Returns it.
    pub(crate) fn change_job(&mut self) -> Option<Generation> {
        let least = self.rules.min_replicas;
        if self.counts.all.healthy >= least || self.counts.held_back < least {
            return None;
        }
        self.visits += self.by_id.len() as u64;
        let mut asking = BTreeMap::new();
        for replica in self.by_id.values().filter(|replica| replica.held_back) {
            if let (true, Some(_), Some(of)) =
                (replica.healthy, &replica.asking, replica.generation)
            {
                *asking.entry(of).or_insert(0) += 1;
            }
        }
        let (next, _) = asking
            .into_iter()
            .filter(|(_, count)| *count >= least)
            .max_by_key(|(of, count)| (*count, *of))?;
        self.job = Some(next);
        for replica in self.by_id.values_mut() {
            replica.held_back = is_other(replica.generation, self.job);
        }
        self.recount(self.counts.floor, self.counts.last_total);
        Some(next)
    }

    /// The request of a call.
    pub(crate) fn request(&self, call_id: CallId) -> Option<(&Replica, &Asking)> {
        let replica = self.by_id.get(self.callers.get(&call_id)?)?;
        Some((replica, replica.asking.as_ref()?))
    }

    /// Whether any request waits for an answer.
    pub(crate) fn is_asked(&self) -> bool {
        !self.callers.is_empty()
    }

    /// Whether any replica is healthy or asks, so that time may change something.
    pub(crate) fn is_watched(&self) -> bool {
        self.is_asked() || self.counts.all.healthy > 0
    }

    /// When the next replica is due to be checked.
    pub(crate) fn next_check(&self) -> Option<Duration> {
        self.checks.first().map(|(at, _)| *at)
    }

    /// How many replicas were visited because of events that were not their own.
    pub(crate) fn visits(&self) -> u64 {
        self.visits
    }

    /// The lighthouse did not run during the last `gap`: it counts neither as silence of the healthy
    /// replicas, nor as waiting time of those that ask.
    pub(crate) fn skip_pause(&mut self, gap: Duration, now: Duration) {
        let ids: Vec<_> = self.by_id.keys().cloned().collect();
        self.visits += ids.len() as u64;
        for id in ids {
            self.change(&id, |replica| {
                if replica.healthy {
                    replica.heard = now;
                }
                if let Some(asking) = &mut replica.asking {
                    asking.since += gap;
                    asking.paused = true;
                }
            });
        }
    }

    /// A heartbeat or a request of this replica has arrived.
    pub(crate) fn hear(&mut self, replica_id: &str, now: Duration) {
        if let Some(replica) = self.by_id.get_mut(replica_id) {
            replica.heard = now;
            if replica.healthy {
                return;
            }
        }
        let id = ReplicaId::from(replica_id);
        let check_at = now + self.rules.heartbeat_timeout;
        if let Some(replica) = self.by_id.get_mut(&id) {
            self.checks.remove(&(replica.check_at, id.clone()));
            replica.check_at = check_at;
        } else {
            self.by_id.insert(id.clone(), Replica::new(now, check_at));
        }
        self.checks.insert((check_at, id.clone()));
        self.change(&id, |replica| replica.healthy = true);
    }

    /// Another process uses this name now: it has no role in the last quorum.
    pub(crate) fn replace(&mut self, id: &ReplicaId) {
        self.change(id, |replica| replica.last_role = None);
    }

    /// A member asks; returns the call of its older request, if one still waited.
    pub(crate) fn ask(&mut self, call_id: CallId, member: Member, now: Duration) -> Option<CallId> {
        let id = member.replica_id.clone();
        let superseded = self.by_id.get(&id)?.asking.as_ref().map(|a| a.call_id);
        if let Some(older) = superseded {
            self.callers.remove(&older);
        }
        self.callers.insert(call_id, id.clone());
        let asking = Asking {
            call_id,
            member: Arc::new(member),
            since: now,
            paused: false,
        };
        let generation = asking.member.generation;
        self.job = self.job.or(generation);
        let held_back = is_other(generation, self.job);
        self.change(&id, |replica| {
            replica.asking = Some(asking);
            replica.generation = generation;
            replica.held_back = held_back;
        });
        superseded
    }

    /// Withdraws a request.
    pub(crate) fn withdraw(&mut self, call_id: CallId) -> Option<Arc<Member>> {
        let id = self.callers.remove(&call_id)?;
        let mut member = None;
        self.change(&id, |replica| {
            member = replica.asking.take().map(|asking| asking.member);
        });
        member
    }

    /// Makes the checks that are due. Returns the members of the last quorum that are dead now, since
    /// no heartbeat came for the heartbeat timeout.
    pub(crate) fn check_due(&mut self, now: Duration) -> Vec<ReplicaId> {
        let mut dead = Vec::new();
        while self.next_check().is_some_and(|at| at <= now) {
            let Some((_, id)) = self.checks.pop_first() else {
                break;
            };
            self.visits += 1;
            if self.check(&id, now) {
                dead.push(id);
            }
        }
        dead
    }

    /// Checks one replica; whether it is a member of the last quorum and is dead now.
    fn check(&mut self, id: &ReplicaId, now: Duration) -> bool {
        let Some(replica) = self.by_id.get(id) else {
            return false;
        };
        let silent_at = replica.heard + self.rules.heartbeat_timeout;
        let forgotten_at = replica.heard + self.rules.forget_after();
        let dies = replica.healthy && silent_at <= now;
        let was_member = replica.last_role.is_some();
        let needed = replica.asking.is_some() || was_member;
        let next = if silent_at > now {
            silent_at
        } else if forgotten_at > now {
            forgotten_at
        } else if needed {
            now + self.rules.forget_after()
        } else {
            self.change(id, |replica| replica.healthy = false);
            self.by_id.remove(id);
            return false;
        };
        self.checks.insert((next, id.clone()));
        self.change(id, |replica| {
            replica.check_at = next;
            replica.healthy &= !dies;
        });
        dies && was_member
    }

    /// Changes one replica, and the counts with it.
    fn change(&mut self, id: &ReplicaId, change: impl FnOnce(&mut Replica)) {
        let Some(replica) = self.by_id.get_mut(id) else {
            return;
        };
        if let Some(asking) = replica.candidate() {
            self.queue.remove(&(asking.since, id.clone()));
        }
        self.counts.adjust(replica, |n| *n -= 1);
        change(replica);
        self.counts.adjust(replica, |n| *n += 1);
        if let Some(asking) = replica.candidate() {
            self.queue.insert((asking.since, id.clone()));
        }
    }

    /// Takes the requests of all candidates out, sorted by id.
    pub(crate) fn take_candidates(&mut self) -> (Vec<CallId>, Vec<Arc<Member>>) {
        let shrinking = self.counts.is_shrinking();
        self.visits += self.by_id.len() as u64;
        self.by_id
            .values_mut()
            .filter(|replica| replica.is_counted() && (replica.last_role.is_some() || !shrinking))
            .filter_map(|replica| replica.asking.take())
            .inspect(|asking| {
                self.callers.remove(&asking.call_id);
            })
            .map(|asking| (asking.call_id, asking.member))
            .unzip()
    }

    /// Requests of healthy members of the last quorum that were told to heal there, sorted by id.
    pub(crate) fn unhealed(&mut self) -> Vec<CallId> {
        self.visits += self.by_id.len() as u64;
        self.by_id
            .values()
            .filter(|replica| replica.last_role == Some(LastRole::Healing))
            .filter_map(|replica| replica.candidate().map(|asking| asking.call_id))
            .collect()
    }

    /// A quorum has formed: it is the last one from now on. The waiting time of the requests that
    /// are not in it starts again.
    pub(crate) fn set_last_quorum(&mut self, quorum: &Quorum, now: Duration) {
        let floor = quorum.max_step();
        self.visits += self.by_id.len() as u64;
        for (id, replica) in &mut self.by_id {
            replica.last_role = quorum.member(id.as_str()).map(|m| LastRole::of(m, floor));
            if let Some(asking) = &mut replica.asking {
                asking.since = now;
            }
        }
        self.recount(floor, quorum.members.len());
    }

    fn recount(&mut self, floor: i64, last_total: usize) {
        self.counts = Counts {
            floor,
            last_total,
            ..Counts::default()
        };
        self.queue.clear();
        for (id, replica) in &self.by_id {
            self.counts.adjust(replica, |n| *n += 1);
            if let Some(asking) = replica.candidate() {
                self.queue.insert((asking.since, id.clone()));
            }
        }
    }
}

impl Replica {
    /// A replica that was just heard, not counted as healthy yet.
    fn new(heard: Duration, check_at: Duration) -> Self {
        Self {
            heard,
            healthy: false,
            asking: None,
            last_role: None,
            generation: None,
            held_back: false,
            check_at,
        }
    }

    /// Whether decisions depend on it.
    pub(crate) fn is_counted(&self) -> bool {
        self.healthy && !self.held_back
    }

    fn candidate(&self) -> Option<&Asking> {
        self.asking.as_ref().filter(|_| self.is_counted())
    }
}

fn is_other(generation: Option<Generation>, job: Option<Generation>) -> bool {
    generation.is_some() && job.is_some() && generation != job
}

impl LastRole {
    fn of(member: &Member, floor: i64) -> Self {
        if member.step >= floor {
            Self::UpToDate
        } else {
            Self::Healing
        }
    }
}

impl Counts {
    /// Changes by `step` all counts to which this replica belongs.
    fn adjust(&mut self, replica: &Replica, step: fn(&mut usize)) {
        if replica.healthy && replica.held_back && replica.asking.is_some() {
            step(&mut self.held_back);
        }
        if !replica.is_counted() {
            return;
        }
        let floor = self.floor;
        let request = replica.asking.as_ref().map(|asking| &asking.member);
        let counts = [
            Some(&mut self.all),
            replica.last_role.map(|_| &mut self.last),
        ];
        for count in counts.into_iter().flatten() {
            step(&mut count.healthy);
            if let Some(member) = request {
                step(&mut count.asking);
                if member.step >= floor {
                    step(&mut count.at_floor);
                }
            }
        }
        if request.is_some_and(|member| member.shrink_only) {
            step(&mut self.shrink_only);
        }
        if request.is_some() && replica.last_role == Some(LastRole::UpToDate) {
            step(&mut self.last_donors_asking);
        }
    }
}
