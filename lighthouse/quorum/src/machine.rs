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
//! A lighthouse that did not run for a while (stopped, or its machine was) heard nobody, which says
//! nothing of them. So while it counts silences it wants to be woken several times in a heartbeat
//! timeout; when an event comes much later than that, the gap is its own, and is not counted.

use std::sync::Arc;
use std::time::Duration;

use crate::decide::{Census, Decision, Formed, Wait, decide};
use crate::effect::{Effect, Notice, Refusal, Renewal, StateLost};
use crate::member::{Member, Quorum, ReplicaId, Ticket};
use crate::roster::{Peer, Roster};
use crate::rules::{BadRules, Rules};
use crate::status::{ReplicaStatus, Status};
use crate::waiting::Waiting;

/// The lighthouse: who heartbeats, who asks, and the last quorum.
///
/// Every event returns the effects that follow from it. The shell calls [`Machine::tick`] when
/// [`Machine::next_wake`] has come, and holds the callers' deadlines: when one passes it calls
/// [`Machine::give_up`].
#[derive(Debug)]
pub struct Machine {
    rules: Rules,
    roster: Roster,
    last: Option<Arc<Quorum>>,
    /// When it heard anybody for the first time.
    first_heard: Option<Duration>,
    /// Somebody who asked was in a quorum of an earlier lighthouse.
    takes_over: bool,
    /// No id up to this one is given out again.
    highest_id: i64,
    /// The time of the last event.
    now: Duration,
}

impl Machine {
    /// A lighthouse without memory. `epoch_ms` is the wall clock in milliseconds: the first quorum
    /// id lies above it, so that ids do not repeat when the lighthouse restarts.
    pub fn new(rules: Rules, epoch_ms: i64) -> Result<Self, BadRules> {
        let rules = rules.check()?;
        Ok(Self {
            rules,
            roster: Roster::new(rules),
            last: None,
            first_heard: None,
            takes_over: false,
            highest_id: epoch_ms.max(0),
            now: Duration::ZERO,
        })
    }

    /// `replica_id` is alive. An empty id is ignored.
    pub fn heartbeat(&mut self, replica_id: &str, now: Duration) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        if !replica_id.is_empty() {
            self.hear(replica_id);
        }
        self.settle(&mut effects);
        effects
    }

    /// `member` asks for a quorum. It is answered by exactly one `Publish` or `Refuse` that names
    /// `ticket`, unless it leaves before. `last_quorum_id` is the highest id it has seen, 0 if none.
    pub fn join(
        &mut self,
        ticket: Ticket,
        member: Member,
        last_quorum_id: i64,
        now: Duration,
    ) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        if let Err(bad) = member.check(last_quorum_id) {
            effects.push(refuse(ticket, bad));
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
        if was.is_some_and(|was| member.lives_elsewhere(was)) {
            self.roster.replace(&replica_id);
        }
        if let Some(older) = self.roster.ask(ticket, member, self.now) {
            effects.push(refuse(older, Refusal::Superseded { replica_id }));
        }
        self.settle(&mut effects);
        effects
    }

    /// The caller hung up: its request is withdrawn, without an answer. Unknown tickets are ignored.
    pub fn leave(&mut self, ticket: Ticket, now: Duration) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        self.roster.withdraw(ticket);
        self.settle(&mut effects);
        effects
    }

    /// The caller's deadline has passed: its request is withdrawn and refused with
    /// [`Refusal::Deadline`], which says what it waited for. Unknown tickets are ignored. The last
    /// moment may still bring it a quorum.
    pub fn give_up(&mut self, ticket: Ticket, now: Duration) -> Vec<Effect> {
        let mut effects = self.tick(now);
        if let Some(refusal) = self.deadline(ticket) {
            self.roster.withdraw(ticket);
            effects.push(refuse(ticket, refusal));
            self.settle(&mut effects);
        }
        effects
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        let mut effects = self.pass_time(now);
        self.settle(&mut effects);
        effects
    }

    /// When time alone may change a decision, or the machine wants to see that it still runs;
    /// `None` while nobody is there. It may come early (a tick then does nothing and the next one is
    /// asked for), never late.
    pub fn next_wake(&self) -> Option<Duration> {
        if !self.roster.is_watched() {
            return None;
        }
        let census = self.census();
        let patience_ends = census.first_asked.map(|at| at + self.rules.join_timeout);
        let ends = patience_ends.into_iter().chain(census.listens_until);
        let pulse = self.now + self.rules.pulse();
        self.roster
            .next_alarm()
            .into_iter()
            .chain(ends.filter(|at| *at > self.now))
            .chain([pulse])
            .min()
    }

    /// The last quorum.
    pub fn last_quorum(&self) -> Option<&Arc<Quorum>> {
        self.last.as_ref()
    }

    /// Why no quorum forms.
    pub fn waiting(&self, now: Duration) -> Waiting {
        let census = self.census();
        let why = match decide(&self.rules, &census, self.now) {
            Decision::Wait(wait) => wait,
            // Every event is settled, so this is not reached.
            Decision::StateLost | Decision::Form { .. } => Wait::NobodyAsks,
        };
        let only_old = census.is_shrinking() || matches!(why, Wait::UpToDate { .. });
        let peers = self.roster.peers();
        let missing = peers.filter(|(_, peer)| {
            peer.healthy && peer.asking.is_none() && (peer.old.is_some() || !only_old)
        });
        Waiting {
            why,
            missing: missing.map(|(id, _)| id.clone()).collect(),
            now: now.max(self.now),
        }
    }

    /// What a person may want to see.
    pub fn status(&self, now: Duration) -> Status {
        let timeout = self.rules.heartbeat_timeout;
        let replica = |(id, peer): (&ReplicaId, &Peer)| {
            let heartbeat_age = now.saturating_sub(peer.heard);
            ReplicaStatus {
                replica_id: id.clone(),
                heartbeat_age,
                healthy: heartbeat_age < timeout,
                asks_at: peer.asking.as_ref().map(|asking| asking.member.step),
                in_last_quorum: peer.old.is_some(),
            }
        };
        Status {
            quorum: self.last.clone(),
            waiting: self.waiting(now),
            replicas: self.roster.peers().map(replica).collect(),
        }
    }

    /// The rules it was given.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// How many times an id was looked at because of an event that was not its own: the part of
    /// the work that grows with the number of groups.
    pub fn looks(&self) -> u64 {
        self.roster.looks()
    }

    fn census(&self) -> Census {
        let new = self.takes_over && self.last.is_none();
        let first_heard = self.first_heard.filter(|_| new);
        Census {
            listens_until: first_heard.map(|at| at + self.rules.heartbeat_timeout),
            ..self.roster.census()
        }
    }

    fn hear(&mut self, replica_id: &str) {
        self.first_heard.get_or_insert(self.now);
        self.roster.hear(replica_id, self.now);
    }

    fn pass_time(&mut self, now: Duration) -> Vec<Effect> {
        let gap = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        let mut notices = Vec::new();
        if self.roster.is_watched() && self.rules.is_pause(gap) {
            self.roster.excuse(gap, self.now);
            self.first_heard = self.first_heard.map(|at| at + gap);
            notices.push(Notice::Paused { gap });
        }
        let fell_silent = self.roster.pass_time(self.now).into_iter();
        notices.extend(fell_silent.map(|replica_id| Notice::FellSilent { replica_id }));
        notices.into_iter().map(Effect::Notice).collect()
    }

    /// Decides until there is nothing left to decide.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        loop {
            match decide(&self.rules, &self.census(), self.now) {
                Decision::Wait(_) => return,
                Decision::StateLost => self.refuse_the_lost(effects),
                Decision::Form { why, below_floor } => self.form(why, below_floor, effects),
            }
        }
    }

    fn form(&mut self, why: Formed, below_floor: bool, effects: &mut Vec<Effect>) {
        let (tickets, members) = self.roster.take_candidates();
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
        self.roster.follow(&quorum, self.now);
        self.last = Some(quorum.clone());
        effects.push(Effect::Publish {
            quorum,
            tickets,
            why,
            renewed,
        });
    }

    fn restarted(&self, quorum: &Quorum) -> Notice {
        Notice::Restarted {
            from: self.roster.census().floor,
            to: quorum.max_step(),
            quorum_id: quorum.id,
        }
    }

    /// Why these members need a new quorum id, if they do.
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
        let new = names(pairs.filter(|(m, was)| m.is_not(was)).map(|(m, _)| m));
        if !new.is_empty() {
            return Some(Renewal::NewProcess(new));
        }
        (self.highest_id > last.id).then_some(Renewal::SeenHigher(self.highest_id))
    }

    fn refuse_the_lost(&mut self, effects: &mut Vec<Effect>) {
        for ticket in self.roster.unhealed() {
            if let Some(member) = self.roster.withdraw(ticket) {
                effects.push(refuse(ticket, self.state_lost(&member)));
            }
        }
    }

    fn state_lost(&self, member: &Member) -> StateLost {
        let lost_step = self.roster.census().floor;
        let last = self.last.iter().flat_map(|last| &last.members);
        StateLost {
            replica_id: member.replica_id.clone(),
            step: member.step,
            lost_step,
            donors: names(last.filter(|m| m.step >= lost_step)),
        }
    }

    fn deadline(&self, ticket: Ticket) -> Option<Refusal> {
        let (peer, asking) = self.roster.request(ticket)?;
        let silent_for = self.now.saturating_sub(peer.heard);
        let waiting = self.waiting(self.now);
        Some(Refusal::Deadline {
            replica_id: asking.member.replica_id.clone(),
            step: asking.member.step,
            silent_for: (!peer.healthy).then_some(silent_for),
            absent: asking.excused || matches!(waiting.why, Wait::Listening { .. }),
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
    /// Whether another process asks under the same name: it lives elsewhere, or it starts at step
    /// 0 and has not been in a quorum. (A manager may go on saying `init_sync` in later steps.)
    fn is_not(&self, was: &Member) -> bool {
        self.lives_elsewhere(was) || (self.is_fresh() && self.step == 0)
    }

    fn lives_elsewhere(&self, was: &Member) -> bool {
        self.address != was.address || self.store_address != was.store_address
    }
}

/// Members whose names differ only in the suffix of their start: processes of one group each.
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

fn refuse(ticket: Ticket, refusal: impl Into<Refusal>) -> Effect {
    Effect::Refuse {
        ticket,
        refusal: refusal.into(),
    }
}
