//! A lighthouse and those who call it. Requests are named `a#1`, `a#2`: the first and second of `a`.

use std::collections::BTreeMap;
use std::time::Duration;

use torchft_quorum::assign::assign;
use torchft_quorum::coordinator::Coordinator;
use torchft_quorum::effect::{Effect, Refusal};
use torchft_quorum::member::{CallId, Generation, Member};
use torchft_quorum::rules::{BadRules, Rules};

use super::Command;

pub struct LighthouseWorld {
    coordinator: Coordinator,
    now: Duration,
    names: BTreeMap<CallId, String>,
    asked: BTreeMap<String, u32>,
}

impl LighthouseWorld {
    pub fn new(command: &Command) -> Result<Self, BadRules> {
        let rules = Rules {
            min_replicas: command.number("min_replicas").unwrap_or(1) as usize,
            join_timeout: command
                .ms("join_timeout_ms")
                .unwrap_or(Duration::from_secs(60)),
            heartbeat_timeout: command
                .ms("heartbeat_timeout_ms")
                .unwrap_or(Duration::from_secs(5)),
        };
        Ok(Self {
            coordinator: Coordinator::new(rules, command.number("epoch").unwrap_or(0))?,
            now: Duration::ZERO,
            names: BTreeMap::new(),
            asked: BTreeMap::new(),
        })
    }

    pub fn run(&mut self, command: &Command) -> Vec<String> {
        let now = self.now;
        match command.verb.as_str() {
            "heartbeat" => self.heartbeat(command),
            "join" => self.join(command),
            "leave" => {
                let call_id = self.call_id(command.name());
                let effects = self.coordinator.leave(call_id, now);
                self.tell(effects)
            }
            "give_up" => {
                let call_id = self.call_id(command.name());
                let effects = self.coordinator.give_up(call_id, now);
                self.tell(effects)
            }
            "wait" => self.wait(command),
            "pause" => {
                self.now += Duration::from_millis(command.name().parse().unwrap());
                Vec::new()
            }
            "why" => vec![self.coordinator.waiting(now).to_string()],
            "status" => self.status(),
            "restart" => self.restart(command),
            "assign" => self.assign(command),
            verb => panic!("{verb}: no such command of a lighthouse"),
        }
    }

    fn heartbeat(&mut self, command: &Command) -> Vec<String> {
        let mut lines = Vec::new();
        for id in command.names() {
            let effects = self.coordinator.heartbeat(id, self.now);
            lines.extend(self.tell(effects));
        }
        lines
    }

    fn join(&mut self, command: &Command) -> Vec<String> {
        let id = command.name();
        let member = Member {
            address: command.text("address").unwrap_or_default().into(),
            store_address: format!("store-{id}"),
            shrink_only: command.says("shrink_only"),
            commit_failures: command.number("failures").unwrap_or(0),
            init_sync: match (command.says("fresh"), command.says("settled")) {
                (true, _) => Some(true),
                (_, true) => Some(false),
                _ => None,
            },
            generation: match command.text("torchft") {
                Some("0.2") => Some(Generation::Store),
                Some("0.3") => Some(Generation::Handles),
                Some("ours") => Some(Generation::Own),
                _ => None,
            },
            ..Member::new(id, command.number("step").unwrap_or(0))
        };
        let call_id = CallId(self.names.len() as u64);
        let times = self.asked.entry(id.into()).or_default();
        *times += 1;
        self.names.insert(call_id, format!("{id}#{times}"));
        let seen = command.number("seen").unwrap_or(0);
        let effects = self.coordinator.join(call_id, member, seen, self.now);
        let lines = self.tell(effects);
        if lines.is_empty() {
            return vec![format!("waits: {}", self.coordinator.waiting(self.now))];
        }
        lines
    }

    /// Moves the clock, waking the coordinator exactly when it asks for it. The `beating` are heard
    /// twice in each heartbeat timeout.
    fn wait(&mut self, command: &Command) -> Vec<String> {
        let end = self.now + Duration::from_millis(command.name().parse().unwrap());
        let beating = command.text("beating").unwrap_or_default();
        let pause = self.coordinator.rules().heartbeat_timeout / 2;
        let mut beat_at = self.now;
        let mut lines = Vec::new();
        loop {
            let wake_at = self.coordinator.next_wake().unwrap_or(end);
            self.now = wake_at.min(beat_at).min(end).max(self.now); // late after a pause
            let mut effects = Vec::new();
            if beat_at == self.now {
                let ids = beating.split(',').filter(|id| !id.is_empty());
                effects.extend(ids.flat_map(|id| self.coordinator.heartbeat(id, self.now)));
                beat_at += pause;
            }
            effects.extend(self.coordinator.tick(self.now));
            let at = self.now.as_millis();
            let told = self.tell(effects).into_iter();
            lines.extend(told.map(|line| format!("at {at} ms: {line}")));
            if self.now == end {
                return lines;
            }
        }
    }

    fn status(&self) -> Vec<String> {
        let status = self.coordinator.status(self.now);
        let quorum = status.quorum.as_ref().map(|q| q.id);
        let mut lines = vec![format!("quorum {quorum:?}; next: {}", status.waiting)];
        lines.extend(status.replicas.iter().map(|replica| {
            let health = if replica.healthy { "healthy" } else { "silent" };
            let old = if replica.in_last_quorum {
                ", in the last quorum"
            } else {
                ""
            };
            let asks = replica.asks_at.map(|step| format!(", asks at step {step}"));
            format!(
                "{}: {health}, heard {} ms ago{old}{}",
                replica.replica_id,
                replica.heartbeat_age.as_millis(),
                asks.unwrap_or_default()
            )
        }));
        lines
    }

    fn restart(&mut self, command: &Command) -> Vec<String> {
        let epoch = command.number("epoch").unwrap_or(0);
        self.coordinator = Coordinator::new(*self.coordinator.rules(), epoch).unwrap();
        Vec::new()
    }

    /// What every member is told of the last quorum, for one group rank.
    fn assign(&self, command: &Command) -> Vec<String> {
        let quorum = self.coordinator.last_quorum().expect("a quorum");
        let rank = command.number("group_rank").unwrap_or(0);
        let wish = command.says("init_sync");
        let told = quorum.replica_ids().map(|id| {
            let a = assign(quorum, id.as_str(), rank, wish).unwrap();
            let heals = a.source.map(|s| format!(", heals from {}", s.replica_rank));
            let gives = match a.recover_dst_replica_ranks.as_slice() {
                [] => String::new(),
                to => format!(", gives to {to:?}"),
            };
            format!(
                "{id}: rank {} of {}, step {}, {:?} of {} ahead, {}{}{gives}; recovering {:?}",
                a.replica_rank,
                a.replica_world_size,
                a.max_step,
                a.max_replica_rank,
                a.max_world_size,
                a.store_address,
                heals.unwrap_or_default(),
                a.recovering_replica_ranks,
            )
        });
        told.collect()
    }

    /// The latest request of an id, or the one named.
    fn call_id(&self, name: &str) -> CallId {
        let latest = match self.asked.get(name) {
            Some(times) => format!("{name}#{times}"),
            None => name.into(),
        };
        let mut names = self.names.iter();
        *names
            .find(|(_, known)| **known == latest)
            .expect("a request")
            .0
    }

    fn tell(&self, effects: Vec<Effect>) -> Vec<String> {
        effects
            .into_iter()
            .map(|effect| self.line(effect))
            .collect()
    }

    fn line(&self, effect: Effect) -> String {
        match effect {
            Effect::Publish {
                quorum,
                call_ids,
                why,
                renewed,
            } => {
                let members = quorum.members.iter();
                let members: Vec<_> = members
                    .map(|m| format!("{}@{}", m.replica_id, m.step))
                    .collect();
                let told: Vec<_> = call_ids.iter().map(|t| self.names[t].as_str()).collect();
                let renewed = renewed.map_or("the id stays".into(), |r| r.to_string());
                format!(
                    "quorum {} of {} for {}: {why}; {renewed}",
                    quorum.id,
                    members.join(" "),
                    told.join(" ")
                )
            }
            Effect::Refuse { call_id, refusal } => {
                let absent = matches!(refusal, Refusal::Deadline { absent: true, .. });
                let again = if absent { " (it may ask again)" } else { "" };
                format!("refuse {}{again}: {refusal}", self.names[&call_id])
            }
            Effect::Notice(notice) => format!("notice: {notice}"),
        }
    }
}
