//! Keeps its own, plain account of what a lighthouse was told, and holds every effect against the
//! invariants of the crate's documentation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use torchft_quorum::assign::assign;
use torchft_quorum::decide::Formed;
use torchft_quorum::effect::{Effect, Notice, Refusal, StateLost};
use torchft_quorum::member::{CallId, Member, Quorum, ReplicaId};
use torchft_quorum::rules::Rules;

/// What the lighthouse should know.
pub struct Audit {
    rules: Rules,
    heard: BTreeMap<ReplicaId, Duration>,
    /// When it heard anybody for the first time since its start.
    first_heard: Option<Duration>,
    /// Somebody has seen a quorum of an earlier lighthouse.
    takes_over: bool,
    asking: BTreeMap<CallId, Member>,
    /// When the first of those that ask did so, or the last quorum left them waiting.
    since: BTreeMap<CallId, Duration>,
    answered: BTreeSet<CallId>,
    last: Option<Arc<Quorum>>,
    /// Names of the last quorum behind which another process has asked since.
    replaced: BTreeSet<ReplicaId>,
    highest_id: i64,
    warned: Option<i64>,
    pub quorums: usize,
}

impl Audit {
    pub fn new(rules: Rules, epoch: i64) -> Self {
        Self {
            rules,
            heard: BTreeMap::new(),
            first_heard: None,
            takes_over: false,
            asking: BTreeMap::new(),
            since: BTreeMap::new(),
            answered: BTreeSet::new(),
            last: None,
            replaced: BTreeSet::new(),
            highest_id: epoch,
            warned: None,
            quorums: 0,
        }
    }

    /// The lighthouse restarts: it forgets all but the clock, and its callers hang up.
    pub fn restart(&mut self, epoch: i64) {
        self.heard.clear();
        self.first_heard = None;
        self.takes_over = false;
        self.asking.clear();
        self.since.clear();
        self.last = None;
        self.replaced.clear();
        self.highest_id = self.highest_id.max(epoch);
    }

    pub fn heartbeat(&mut self, id: &ReplicaId, now: Duration) {
        self.heard.insert(id.clone(), now);
        self.first_heard.get_or_insert(now);
    }

    /// The lighthouse does not run from `now` on: it hears nobody, which is no silence of theirs.
    pub fn pause(&mut self, gap: Duration, now: Duration) {
        let timeout = self.rules.heartbeat_timeout;
        let mut known = self.heard.values();
        let watched = !self.asking.is_empty() || known.any(|heard| now - *heard < timeout);
        if gap <= timeout / 2 || !watched {
            return;
        }
        let healthy = self.heard.values_mut().filter(|h| now - **h < timeout);
        healthy.for_each(|heard| *heard = now + gap);
        self.since.values_mut().for_each(|since| *since += gap);
        self.first_heard = self.first_heard.map(|at| at + gap);
    }

    pub fn join(&mut self, call_id: CallId, member: &Member, seen: i64, now: Duration) {
        self.heartbeat(&member.replica_id, now);
        self.takes_over |= seen > 0 && self.last.is_none();
        let last = self.last.as_ref();
        let was = last.and_then(|last| last.member(member.replica_id.as_str()));
        if was.is_some_and(|was| was.address != member.address) {
            self.replaced.insert(member.replica_id.clone());
        }
        self.asking.insert(call_id, member.clone());
        self.since.insert(call_id, now);
    }

    pub fn leave(&mut self, call_id: CallId) {
        self.asking.remove(&call_id);
        self.since.remove(&call_id);
    }

    /// A request that waits, if any: the `i`-th of them.
    pub fn any_call(&self, i: usize) -> Option<CallId> {
        let waiting = self.asking.len().max(1);
        self.asking.keys().nth(i % waiting).copied()
    }

    /// Whether nobody has answered this request yet.
    pub fn waits(&self, call_id: CallId) -> bool {
        self.asking.contains_key(&call_id)
    }

    /// The highest quorum id that anybody has seen.
    pub fn highest_id(&self) -> i64 {
        self.highest_id
    }

    /// Where this process is when it has healed: at the highest step of the last quorum, if it was
    /// in it.
    pub fn step_of(&self, id: &ReplicaId, address: &str) -> Option<i64> {
        let last = self.last.as_ref()?;
        let was = last.member(id.as_str())?;
        (was.address == address).then_some(last.max_step())
    }

    pub fn check(&mut self, effects: &[Effect], now: Duration) {
        for effect in effects {
            match effect {
                Effect::Publish {
                    quorum,
                    call_ids,
                    why,
                    ..
                } => {
                    self.check_reason(quorum, *why, now);
                    self.check_quorum(quorum, call_ids, now);
                }
                Effect::Refuse { call_id, refusal } => self.check_refusal(*call_id, refusal, now),
                Effect::Notice(Notice::Restarted {
                    from,
                    to,
                    quorum_id,
                }) => {
                    assert_eq!(Some(*from), self.last.as_ref().map(|q| q.max_step()));
                    assert!(to < from);
                    self.warned = Some(*quorum_id);
                }
                Effect::Notice(Notice::Paused { gap }) => {
                    assert!(*gap > self.rules.heartbeat_timeout / 2);
                }
                Effect::Notice(Notice::SameName { replica_ids }) => {
                    assert!(replica_ids.len() > 1);
                }
                Effect::Notice(Notice::OtherGeneration { from, to }) => assert_ne!(from, to),
                Effect::Notice(Notice::Died { replica_id }) => {
                    assert!(!self.is_healthy(replica_id, now));
                }
            }
        }
        self.check_nothing_is_overdue(now);
    }

    fn check_quorum(&mut self, quorum: &Arc<Quorum>, call_ids: &[CallId], now: Duration) {
        let members = &quorum.members;
        assert!(!self.listens(now), "did not listen who else is there");
        assert!(members.is_sorted_by(|a, b| a.replica_id < b.replica_id));
        assert!(
            members.len() >= self.rules.min_replicas,
            "below min_replicas"
        );
        assert_eq!(members.len(), call_ids.len());
        self.check_shrink_only(quorum, now);
        for (call_id, member) in call_ids.iter().zip(members) {
            assert!(self.is_healthy(&member.replica_id, now), "not healthy");
            let asked = self.asking.get(call_id).expect("nobody waits on this call");
            assert_eq!(asked, &**member);
            self.answer(*call_id);
        }
        self.check_id(quorum);
        self.check_floor(quorum, now);
        check_assignments(quorum);
        for since in self.since.values_mut() {
            *since = now;
        }
        self.last = Some(quorum.clone());
        self.replaced.clear();
        self.quorums += 1;
    }

    /// Nobody healthy is left out without having had its time, unless the last quorum is whole.
    fn check_reason(&self, quorum: &Quorum, why: Formed, now: Duration) {
        let inside = |id: &ReplicaId| quorum.member(id.as_str()).is_some();
        let shrinking = self.asking.values().any(|m| m.shrink_only) && self.last.is_some();
        let healthy = self.heard.keys().filter(|id| self.is_healthy(id, now));
        let left_out = healthy.filter(|id| !inside(id)).count();
        match why {
            Formed::Fast => {
                let last = self.last.as_ref().expect("a last quorum that is whole");
                assert!(last.replica_ids().all(inside));
                assert!(self.replaced.is_empty());
            }
            Formed::AllJoined => assert!(left_out == 0 || shrinking),
            Formed::JoinTimeout { absent } => {
                assert!(absent == left_out || shrinking);
                assert!(quorum.members.len() > absent, "no majority");
                let asking = self.asking.iter();
                let asking = asking.filter(|(_, m)| self.is_healthy(&m.replica_id, now));
                let first = asking.map(|(call_id, _)| self.since[call_id]).min();
                let patience_ends = first.expect("somebody asks") + self.rules.join_timeout;
                assert!(now >= patience_ends, "did not wait for the join timeout");
            }
        }
    }

    /// Ids rise, unless the very same members go on.
    fn check_id(&mut self, quorum: &Quorum) {
        if quorum.id <= self.highest_id {
            let last = self.last.as_ref().expect("an id before the epoch");
            assert_eq!(quorum.id, last.id, "an id came again");
            assert!(quorum.replica_ids().eq(last.replica_ids()));
            assert!(self.replaced.is_empty());
            assert!(quorum.members.iter().all(|m| m.commit_failures == 0));
        }
        self.highest_id = self.highest_id.max(quorum.id);
    }

    /// A step that was reached is left only with a warning, and never by those who were to heal.
    fn check_floor(&mut self, quorum: &Quorum, now: Duration) {
        let warned = self.warned.take();
        let Some(last) = &self.last else { return };
        let floor = last.max_step();
        if quorum.max_step() >= floor {
            assert_eq!(warned, None);
            return;
        }
        assert_eq!(warned, Some(quorum.id), "went back without a warning");
        let inside = |id: &ReplicaId| quorum.member(id.as_str()).is_some();
        let is_old = |id: &ReplicaId| !self.replaced.contains(id);
        let outside = last.replica_ids().filter(|id| is_old(id) && !inside(id));
        let mut outside = outside.filter(|id| self.is_healthy(id, now));
        assert_eq!(
            outside.next(),
            None,
            "did not wait for one that may have the step"
        );
        let old = || {
            let old = last.members.iter();
            old.filter(|m| is_old(&m.replica_id) && inside(&m.replica_id))
        };
        assert!(old().count() == 0 || old().any(|m| m.step == floor));
    }

    fn check_shrink_only(&self, quorum: &Quorum, now: Duration) {
        let Some(last) = &self.last else { return };
        let mut asking = self.asking.values();
        if asking.any(|m| m.shrink_only && self.is_healthy(&m.replica_id, now)) {
            let mut ids = quorum.replica_ids();
            assert!(ids.all(|id| last.member(id.as_str()).is_some()));
            assert!(quorum.replica_ids().all(|id| !self.replaced.contains(id)));
        }
    }

    fn check_refusal(&mut self, call_id: CallId, refusal: &Refusal, now: Duration) {
        match refusal {
            Refusal::BadMember(_) => {
                assert!(!self.asking.contains_key(&call_id));
                return;
            }
            Refusal::StateLost(lost) => self.check_lost(lost, now),
            Refusal::Superseded { .. } | Refusal::Deadline { .. } | Refusal::HeldBack { .. } => {}
        }
        self.answer(call_id);
    }

    fn check_lost(&self, lost: &StateLost, now: Duration) {
        let last = self
            .last
            .as_ref()
            .expect("a quorum in which it was to heal");
        assert_eq!(lost.lost_step, last.max_step());
        assert!(lost.step < lost.lost_step);
        let was = last.member(lost.replica_id.as_str());
        assert!(
            was.is_some_and(|m| m.step < lost.lost_step),
            "was not to heal"
        );
        assert!(!self.replaced.contains(&lost.replica_id));
        assert!(!lost.donors.is_empty());
        let is_old = |id: &&ReplicaId| !self.replaced.contains(*id);
        let mut donors = lost.donors.iter().filter(is_old);
        assert!(donors.all(|id| !self.is_healthy(id, now)));
    }

    /// Every call gets one answer.
    fn answer(&mut self, call_id: CallId) {
        assert!(
            self.asking.contains_key(&call_id),
            "nobody waits on {call_id:?}"
        );
        assert!(
            self.answered.insert(call_id),
            "{call_id:?} is answered twice"
        );
        self.leave(call_id);
    }

    /// When all healthy ids ask, or the join timeout has passed for a majority, and neither
    /// `shrink_only` nor the donor rule stands against it, nobody waits.
    fn check_nothing_is_overdue(&self, now: Duration) {
        if self.listens(now) {
            return;
        }
        let healthy = self
            .heard
            .keys()
            .filter(|id| self.is_healthy(id, now))
            .count();
        let candidates = || {
            let asking = self.asking.iter();
            asking.filter(|(_, m)| self.is_healthy(&m.replica_id, now))
        };
        let count = candidates().count();
        let best = candidates().map(|(_, m)| m.step).max();
        let floor = self.last.as_ref().map_or(0, |last| last.max_step());
        let blocked = candidates().any(|(_, m)| m.shrink_only) || best < Some(floor);
        let first = candidates().map(|(call_id, _)| self.since[call_id]).min();
        let patient = first.is_some_and(|first| now < first + self.rules.join_timeout);
        let due = count == healthy || (count > healthy / 2 && !patient);
        let overdue = count >= self.rules.min_replicas && due && !blocked;
        assert!(
            !overdue,
            "{count} of {healthy} ask and nothing stands against it"
        );
    }

    /// Whether it has just taken over from an earlier lighthouse.
    fn listens(&self, now: Duration) -> bool {
        let new = self.takes_over && self.last.is_none();
        let heard = self.first_heard.filter(|_| new);
        heard.is_some_and(|at| now < at + self.rules.heartbeat_timeout)
    }

    fn is_healthy(&self, id: &ReplicaId, now: Duration) -> bool {
        let heard = self.heard.get(id);
        heard.is_some_and(|heard| now - *heard < self.rules.heartbeat_timeout)
    }
}

/// All members' parts of a quorum fit together, for any group rank.
fn check_assignments(quorum: &Quorum) {
    let max_step = quorum.max_step();
    let settled = quorum.members.iter().any(|m| m.init_sync == Some(false));
    for group_rank in 0..4 {
        for wish in [false, true] {
            let told = quorum.replica_ids().map(|id| {
                assign(quorum, id.as_str(), group_rank, wish).expect("a member has its part")
            });
            let told: Vec<_> = told.collect();
            for (rank, part) in told.iter().enumerate() {
                assert_eq!(part.replica_rank, rank as i64);
                assert_eq!(part.store_address, told[0].store_address);
                assert_eq!(
                    part.recovering_replica_ranks,
                    told[0].recovering_replica_ranks
                );
                let heals = part.recovering_replica_ranks.contains(&part.replica_rank);
                assert_eq!(part.source.is_some(), heals);
                let member = &quorum.members[rank];
                assert!(heals || member.step == max_step, "behind, but not healed");
                let first_step = max_step == 0 && settled;
                assert!(
                    heals || !first_step || member.init_sync != Some(true),
                    "fresh"
                );
                for to in &part.recover_dst_replica_ranks {
                    assert!(!heals, "one who heals is a donor");
                    let source = told[*to as usize].source.as_ref().expect("a source");
                    assert_eq!(source.replica_rank, part.replica_rank);
                }
            }
            let given: usize = told.iter().map(|p| p.recover_dst_replica_ranks.len()).sum();
            assert_eq!(given, told[0].recovering_replica_ranks.len());
            assert!(given < told.len(), "nobody is up to date");
        }
    }
}
