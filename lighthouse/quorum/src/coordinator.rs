//! The lighthouse as a state machine: heartbeats and requests go in, quorums and refusals come out.
//!
//! Every event is decided at once ([`crate::decide`] has the rules); nothing waits for a tick. When
//! a quorum forms, its id is
//! - the last one's, if the names and the processes behind them are the same and nobody has
//!   discarded a step: then the process groups of the last quorum serve on;
//! - else one more than the highest id ever given out here, or seen by anybody who asked, or the
//!   milliseconds on the wall clock when this lighthouse started: so it never repeats.
//!
//! Those who asked and are not in it keep waiting.
//!
//! A lighthouse whose process or host was stopped for a while received no heartbeats, though they
//! were sent. So while it watches for missing heartbeats it asks to be woken several times in a
//! heartbeat timeout. When an event comes much later than that, the lighthouse itself did not run,
//! and the gap is not counted as anybody's silence.

use std::sync::Arc;
use std::time::Duration;

use crate::decide::{Counts, Decision, Formed, Wait, decide};
use crate::effect::{Effect, Notice, Refusal, Renewal, StateLost};
use crate::member::{CallId, Member, Quorum, ReplicaId};
use crate::replicas::{Replica, Replicas};
use crate::rules::{BadRules, Rules};
use crate::status::{ReplicaStatus, Status};
use crate::waiting::Waiting;

/// The lighthouse's state machine: who is alive, who asks, and the last quorum.
///
/// Every event returns the effects that follow from it. The server calls [`Coordinator::tick`] when
/// [`Coordinator::next_wake`] has come, and holds the callers' deadlines: when one passes it calls
/// [`Coordinator::give_up`].
#[derive(Debug)]
pub struct Coordinator {
    rules: Rules,
    replicas: Replicas,
    last: Option<Arc<Quorum>>,
    /// When the first heartbeat or request arrived.
    first_heard: Option<Duration>,
    /// A replica that asked was in a quorum of an earlier lighthouse.
    takes_over: bool,
    /// Every new quorum id is above this one.
    highest_id: i64,
    /// The time of the last event.
    now: Duration,
}

impl Coordinator {
    /// A lighthouse that knows nobody yet. `epoch_ms` is the wall clock in milliseconds: the first quorum
    /// id lies above it, so that ids do not repeat when the lighthouse restarts.
    pub fn new(rules: Rules, epoch_ms: i64) -> Result<Self, BadRules> {
        let rules = rules.check()?;
        Ok(Self {
            rules,
            replicas: Replicas::new(rules),
            last: None,
            first_heard: None,
            takes_over: false,
            highest_id: epoch_ms.max(0),
            now: Duration::ZERO,
        })
    }

    /// A heartbeat: `replica_id` is alive. An empty id is ignored.
    pub fn heartbeat(&mut self, replica_id: &str, now: Duration) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        if !replica_id.is_empty() {
            self.hear(replica_id);
        }
        self.run_decisions(&mut effects);
        effects
    }

    /// `member` asks for a quorum. It is answered by exactly one `Publish` or `Refuse` that names
    /// `call_id`, unless it leaves before. `last_quorum_id` is the highest id it has seen, 0 if none.
    pub fn join(
        &mut self,
        call_id: CallId,
        member: Member,
        last_quorum_id: i64,
        now: Duration,
    ) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        if let Err(bad) = member.check(last_quorum_id) {
            effects.push(refuse(call_id, bad));
            return effects;
        }
        self.highest_id = self.highest_id.max(last_quorum_id);
        self.takes_over |= last_quorum_id > 0 && self.last.is_none();
        let replica_id = member.replica_id.clone();
        self.hear(replica_id.as_str());
        let was = self
            .last
            .as_ref()
            .and_then(|q| q.member(replica_id.as_str()));
        if was.is_some_and(|was| member.has_other_addresses(was)) {
            self.replicas.replace(&replica_id);
        }
        if let Some(older) = self.replicas.ask(call_id, member, self.now) {
            effects.push(refuse(older, Refusal::Superseded { replica_id }));
        }
        self.run_decisions(&mut effects);
        effects
    }

    /// The caller hung up: its request is withdrawn, without an answer. Unknown ids are ignored.
    pub fn leave(&mut self, call_id: CallId, now: Duration) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        self.replicas.withdraw(call_id);
        self.run_decisions(&mut effects);
        effects
    }

    /// The caller's deadline has passed: its request is withdrawn and refused with
    /// [`Refusal::Deadline`], which says what it waited for. Unknown ids are ignored. The last
    /// moment may still bring it a quorum.
    pub fn give_up(&mut self, call_id: CallId, now: Duration) -> Vec<Effect> {
        let mut effects = self.tick(now);
        if let Some(refusal) = self.deadline(call_id) {
            self.replicas.withdraw(call_id);
            effects.push(refuse(call_id, refusal));
            self.run_decisions(&mut effects);
        }
        effects
    }

    /// Time has passed: decides what follows from that alone.
    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        self.run_decisions(&mut effects);
        effects
    }

    /// When to call [`Coordinator::tick`], because time alone may change a decision or to prove that
    /// this lighthouse still runs; `None` while nobody is known. It may come early (a tick then does nothing and the next one is
    /// asked for), never late.
    pub fn next_wake(&self) -> Option<Duration> {
        if !self.replicas.is_watched() {
            return None;
        }
        let counts = self.counts();
        let patience_ends = counts.first_asked.map(|at| at + self.rules.join_timeout);
        let ends = patience_ends.into_iter().chain(counts.listens_until);
        let wake_interval = self.now + self.rules.wake_interval();
        self.replicas
            .next_check()
            .into_iter()
            .chain(ends.filter(|at| *at > self.now))
            .chain([wake_interval])
            .min()
    }

    /// The last quorum, if there was one.
    pub fn last_quorum(&self) -> Option<&Arc<Quorum>> {
        self.last.as_ref()
    }

    /// Why no quorum forms now.
    pub fn waiting(&self, now: Duration) -> Waiting {
        let counts = self.counts();
        let why = match decide(&self.rules, &counts, self.now) {
            Decision::Wait(wait) => wait,
            // Every event runs its decisions at once, so this is not reached.
            Decision::StateLost | Decision::Form { .. } => Wait::NobodyAsks,
        };
        let only_last = counts.is_shrinking() || matches!(why, Wait::UpToDate { .. });
        let missing = self.replicas.iter().filter(|(_, replica)| {
            let is_eligible = replica.last_role.is_some() || !only_last;
            replica.is_counted() && replica.asking.is_none() && is_eligible
        });
        Waiting {
            why,
            missing: missing.map(|(id, _)| id.clone()).collect(),
            now: now.max(self.now),
        }
    }

    /// The last quorum, the reason to wait, and all known replicas.
    pub fn status(&self, now: Duration) -> Status {
        let timeout = self.rules.heartbeat_timeout;
        let status = |(id, replica): (&ReplicaId, &Replica)| {
            let heartbeat_age = now.saturating_sub(replica.heard);
            ReplicaStatus {
                replica_id: id.clone(),
                heartbeat_age,
                healthy: heartbeat_age < timeout,
                asks_at: replica.asking.as_ref().map(|asking| asking.member.step),
                in_last_quorum: replica.last_role.is_some(),
            }
        };
        Status {
            quorum: self.last.clone(),
            waiting: self.waiting(now),
            replicas: self.replicas.iter().map(status).collect(),
        }
    }

    /// The rules it was given.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// How many replicas were visited because of events that were not their own: the part of the
    /// work that grows with their number.
    pub fn visits(&self) -> u64 {
        self.replicas.visits()
    }

    fn counts(&self) -> Counts {
        let new = self.takes_over && self.last.is_none();
        let first_heard = self.first_heard.filter(|_| new);
        Counts {
            listens_until: first_heard.map(|at| at + self.rules.heartbeat_timeout),
            ..self.replicas.counts()
        }
    }

    fn hear(&mut self, replica_id: &str) {
        self.first_heard.get_or_insert(self.now);
        self.replicas.hear(replica_id, self.now);
    }

    fn pass_time(&mut self, now: Duration) -> Vec<Effect> {
        let gap = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        let mut notices = Vec::new();
        if self.replicas.is_watched() && self.rules.is_pause(gap) {
            self.replicas.skip_pause(gap, self.now);
            self.first_heard = self.first_heard.map(|at| at + gap);
            notices.push(Notice::Paused { gap });
        }
        let dead = self.replicas.check_due(self.now).into_iter();
        notices.extend(dead.map(|replica_id| Notice::Died { replica_id }));
        notices.into_iter().map(Effect::Notice).collect()
    }

    /// Decides until there is nothing left to decide.
    fn run_decisions(&mut self, effects: &mut Vec<Effect>) {
        let before = self.replicas.job();
        if let (Some(from), Some(to)) = (before, self.replicas.change_job()) {
            effects.push(Effect::Notice(Notice::OtherGeneration { from, to }));
        }
        loop {
            match decide(&self.rules, &self.counts(), self.now) {
                Decision::Wait(_) => return,
                Decision::StateLost => self.refuse_unhealed(effects),
                Decision::Form { why, below_floor } => self.form(why, below_floor, effects),
            }
        }
    }

    fn form(&mut self, why: Formed, below_floor: bool, effects: &mut Vec<Effect>) {
        let (call_ids, members) = self.replicas.take_candidates();
        let renewed = self.renewal(&members);
        let id = match (&renewed, &self.last) {
            (None, Some(last)) => last.id,
            _ => self.highest_id + 1,
        };
        self.highest_id = self.highest_id.max(id);
        let quorum = Arc::new(Quorum {
            id,
            members,
            formed_at: self.now,
        });
        if below_floor {
            effects.push(Effect::Notice(self.restarted(&quorum)));
        }
        if renewed.is_some() {
            let same = same_names(&quorum).into_iter();
            effects
                .extend(same.map(|replica_ids| Effect::Notice(Notice::SameName { replica_ids })));
        }
        self.replicas.set_last_quorum(&quorum, self.now);
        self.last = Some(quorum.clone());
        effects.push(Effect::Publish {
            quorum,
            call_ids,
            why,
            renewed,
        });
    }

    fn restarted(&self, quorum: &Quorum) -> Notice {
        Notice::Restarted {
            from: self.replicas.counts().floor,
            to: quorum.max_step(),
            quorum_id: quorum.id,
        }
    }

    /// The reason why these members need a new quorum id, if they do.
    fn renewal(&self, members: &[Arc<Member>]) -> Option<Renewal> {
        let Some(last) = &self.last else {
            return Some(Renewal::First);
        };
        if !last.replica_ids().eq(members.iter().map(|m| &m.replica_id)) {
            return Some(Renewal::of_members(&last.members, members));
        }
        let failed = names(members.iter().filter(|m| m.commit_failures > 0));
        if !failed.is_empty() {
            return Some(Renewal::CommitFailures(failed));
        }
        let pairs = members.iter().zip(&last.members);
        let new = names(
            pairs
                .filter(|(m, was)| m.is_another_process_than(was))
                .map(|(m, _)| m),
        );
        if !new.is_empty() {
            return Some(Renewal::NewProcess(new));
        }
        (self.highest_id > last.id).then_some(Renewal::SeenHigher(self.highest_id))
    }

    fn refuse_unhealed(&mut self, effects: &mut Vec<Effect>) {
        for call_id in self.replicas.unhealed() {
            if let Some(member) = self.replicas.withdraw(call_id) {
                effects.push(refuse(call_id, self.state_lost(&member)));
            }
        }
    }

    fn state_lost(&self, member: &Member) -> StateLost {
        let lost_step = self.replicas.counts().floor;
        let last = self.last.iter().flat_map(|last| &last.members);
        StateLost {
            replica_id: member.replica_id.clone(),
            step: member.step,
            lost_step,
            donors: names(last.filter(|m| m.step >= lost_step)),
        }
    }

    fn counted(&self) -> Vec<ReplicaId> {
        let counted = self.replicas.iter().filter(|(_, one)| one.is_counted());
        counted.map(|(id, _)| id.clone()).collect()
    }

    fn deadline(&self, call_id: CallId) -> Option<Refusal> {
        let (replica, asking) = self.replicas.request(call_id)?;
        if let (true, Some(own), Some(job)) =
            (replica.held_back, replica.generation, self.replicas.job())
        {
            return Some(Refusal::HeldBack {
                replica_id: asking.member.replica_id.clone(),
                own,
                job,
                waits_for: self.counted(),
                min_replicas: self.rules.min_replicas,
            });
        }
        let silent_for = self.now.saturating_sub(replica.heard);
        let waiting = self.waiting(self.now);
        Some(Refusal::Deadline {
            replica_id: asking.member.replica_id.clone(),
            step: asking.member.step,
            silent_for: (!replica.healthy).then_some(silent_for),
            absent: asking.paused || matches!(waiting.why, Wait::Listening { .. }),
            waiting,
        })
    }
}

impl Renewal {
    fn of_members(last: &[Arc<Member>], new: &[Arc<Member>]) -> Self {
        let without = |these: &[Arc<Member>], those: &[Arc<Member>]| {
            let known = |id: &ReplicaId| those.binary_search_by(|m| m.replica_id.cmp(id)).is_ok();
            names(these.iter().filter(|m| !known(&m.replica_id)))
        };
        Self::Members {
            joined: without(new, last),
            left: without(last, new),
        }
    }
}

impl Member {
    /// Whether another process asks under the same name: its addresses differ, or it starts at step
    /// 0 and has not been in a quorum. (A manager may go on saying `init_sync` in later steps.)
    fn is_another_process_than(&self, was: &Member) -> bool {
        self.has_other_addresses(was) || (self.is_fresh() && self.step == 0)
    }

    fn has_other_addresses(&self, was: &Member) -> bool {
        self.address != was.address || self.store_address != was.store_address
    }
}

/// The sets of members whose names differ only in the suffix of their start.
fn same_names(quorum: &Quorum) -> Vec<Vec<ReplicaId>> {
    let members: Vec<_> = quorum.replica_ids().collect();
    members
        .chunk_by(|a, b| a.group().is_some() && a.group() == b.group())
        .filter(|same| same.len() > 1)
        .map(|same| same.iter().map(|id| (*id).clone()).collect())
        .collect()
}

fn names<'a>(members: impl Iterator<Item = &'a Arc<Member>>) -> Vec<ReplicaId> {
    members.map(|m| m.replica_id.clone()).collect()
}

fn refuse(call_id: CallId, refusal: impl Into<Refusal>) -> Effect {
    Effect::Refuse {
        call_id,
        refusal: refusal.into(),
    }
}
