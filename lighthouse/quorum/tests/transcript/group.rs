//! A group: its local ranks ask for quorums and vote. The latest request of rank 0 is named `0`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use torchft_quorum::gather::{Failure, FailureKind, Gather, GatherEffect, Group, RankAsk, Round};
use torchft_quorum::member::{CallId, Handle, Member, Quorum};
use torchft_quorum::vote::{CommitBarrier, RankVote, VoteEffect};

use super::Command;

pub struct GroupWorld {
    gather: Gather,
    vote: CommitBarrier,
    now: Duration,
    /// Rank and kind of each request.
    names: BTreeMap<CallId, String>,
}

impl GroupWorld {
    pub fn new(command: &Command) -> Self {
        let world_size = command.number("world_size").unwrap_or(1) as u64;
        Self {
            gather: Gather::new(Group {
                replica_id: command.name().into(),
                address: format!("http://{}", command.name()),
                store_address: format!("store-{}", command.name()),
                world_size,
                quorum_retries: command.number("quorum_retries").unwrap_or(0) as u32,
            }),
            vote: CommitBarrier::new(world_size),
            now: Duration::ZERO,
            names: BTreeMap::new(),
        }
    }

    pub fn run(&mut self, command: &Command) -> Vec<String> {
        match command.verb.as_str() {
            "ask" => self.ask(command),
            "leave" => {
                let effects = self.gather.leave(self.latest("ask", command));
                self.tell(effects)
            }
            "give_up" => {
                let effects = self.gather.give_up(self.latest("ask", command));
                self.tell(effects)
            }
            "answered" => self.answered(command),
            "wait" => self.wait(command),
            "metadata" => {
                let rank = command.name().parse().unwrap();
                vec![format!("{:?}", self.gather.checkpoint_metadata(rank))]
            }
            "vote" => self.cast(command),
            "leave_vote" => {
                let effects = self.vote.leave(self.latest("vote", command));
                self.count(effects)
            }
            "give_up_vote" => {
                let effects = self.vote.give_up(self.latest("vote", command));
                self.count(effects)
            }
            verb => panic!("{verb}: no such command of a group"),
        }
    }

    fn ask(&mut self, command: &Command) -> Vec<String> {
        let group_rank = command.name().parse().unwrap();
        let ask = RankAsk {
            group_rank,
            step: command.number("step").unwrap_or(0),
            checkpoint_metadata: command.text("metadata").unwrap_or_default().into(),
            shrink_only: command.says("shrink_only"),
            init_sync: command.says("init_sync"),
            final_sync: false,
            commit_failures: command.number("failures").unwrap_or(0),
            handle: command.text("handle").unwrap_or_default().to_owned().into(),
            deadline: self.now + command.ms("timeout_ms").unwrap_or(Duration::from_secs(60)),
        };
        let call_id = self.named(format!("ask {group_rank}"));
        let effects = self.gather.ask(call_id, ask, self.now);
        self.tell(effects)
    }

    /// `answered 1 b@6 a@5 id=7`, or `answered 1 unreachable "connection refused"`.
    fn answered(&mut self, command: &Command) -> Vec<String> {
        let mut names = command.names();
        let round = Round(names.next().unwrap().parse().unwrap());
        let kind = match names.next().unwrap_or_default() {
            "unreachable" => Some(FailureKind::Unreachable),
            "failed" => Some(FailureKind::Failed),
            "refused" => Some(FailureKind::Refused),
            "state_lost" => Some(FailureKind::StateLost),
            "deadline" => Some(FailureKind::Deadline),
            _ => None,
        };
        let answer = match kind {
            Some(kind) => Err(Failure {
                kind,
                message: command.quote().into(),
            }),
            None => Ok(Arc::new(Quorum {
                id: command.number("id").unwrap_or(1),
                members: command
                    .names()
                    .skip(1)
                    .map(|m| member(m, command))
                    .collect(),
                formed_at: self.now,
            })),
        };
        let effects = self.gather.answered(round, answer, self.now);
        self.tell(effects)
    }

    fn wait(&mut self, command: &Command) -> Vec<String> {
        let end = self.now + Duration::from_millis(command.name().parse().unwrap());
        let mut lines = Vec::new();
        while let Some(at) = self.gather.next_wake().filter(|at| *at <= end) {
            self.now = at;
            let effects = self.gather.tick(at);
            let at = at.as_millis();
            let told = self.tell(effects).into_iter();
            lines.extend(told.map(|line| format!("at {at} ms: {line}")));
        }
        self.now = end;
        lines
    }

    fn cast(&mut self, command: &Command) -> Vec<String> {
        let group_rank = command.name().parse().unwrap();
        let rank_vote = RankVote {
            group_rank,
            step: command.number("step").unwrap_or(0),
            commit: command.says("yes"),
        };
        let call_id = self.named(format!("vote {group_rank}"));
        let effects = self.vote.vote(call_id, rank_vote);
        self.count(effects)
    }

    fn named(&mut self, name: String) -> CallId {
        let call_id = CallId(self.names.len() as u64);
        self.names.insert(call_id, name);
        call_id
    }

    fn latest(&self, kind: &str, command: &Command) -> CallId {
        let name = format!("{kind} {}", command.name());
        let mut names = self.names.iter().rev();
        *names
            .find(|(_, known)| **known == name)
            .expect("a request")
            .0
    }

    /// Carries effects out as a shell does: a round that begins voids the votes.
    fn tell(&mut self, effects: Vec<GatherEffect>) -> Vec<String> {
        let mut lines = Vec::new();
        for effect in effects {
            let begins = matches!(effect, GatherEffect::RoundBegins(_));
            lines.push(self.line(effect));
            if begins {
                let effects = self.vote.begin();
                lines.extend(self.count(effects));
            }
        }
        lines
    }

    fn line(&self, effect: GatherEffect) -> String {
        match effect {
            GatherEffect::RoundBegins(Round(round)) => format!("round {round} begins"),
            GatherEffect::Cancel(Round(round)) => format!("cancel the request of round {round}"),
            GatherEffect::Send {
                round,
                attempt,
                member,
                last_quorum_id,
                deadline,
            } => format!(
                "send round {} attempt {attempt}: {}@{} shrink_only={} init_sync={:?} failures={} \
                 last_quorum_id={last_quorum_id} deadline={} ms{}",
                round.0,
                member.replica_id,
                member.step,
                member.shrink_only,
                member.init_sync,
                member.commit_failures,
                deadline.as_millis(),
                told(" handles", &member.handles),
            ),
            GatherEffect::Answer {
                call_id,
                assignment,
            } => format!(
                "{} -> quorum {}, rank {} of {}, heals: {}{}",
                self.names[&call_id],
                assignment.quorum_id,
                assignment.replica_rank,
                assignment.replica_world_size,
                assignment.source.is_some(),
                told(", handles", &assignment.handles),
            ),
            GatherEffect::Refuse { call_id, refusal } => {
                format!("refuse {}: {refusal}", self.names[&call_id])
            }
        }
    }

    fn count(&self, effects: Vec<VoteEffect>) -> Vec<String> {
        let lines = effects.into_iter().map(|effect| match effect {
            VoteEffect::Answer { call_id, outcome } => {
                format!(
                    "{} -> {}: {outcome}",
                    self.names[&call_id],
                    outcome.commits()
                )
            }
            VoteEffect::Refuse { call_id, refusal } => {
                format!("refuse {}: {refusal}", self.names[&call_id])
            }
        });
        lines.collect()
    }
}

/// `a@5` is the replica `a` at step 5.
/// `b@6`, with the handles that `handles_b=` gives it.
fn member(text: &str, command: &Command) -> Arc<Member> {
    let (id, step) = text.split_once('@').expect("a replica and its step");
    let handles = command.text(&format!("handles_{id}"));
    let handles = handles.into_iter().flat_map(|list| list.split(','));
    Arc::new(Member {
        handles: handles.map(|handle| handle.to_owned().into()).collect(),
        ..Member::new(id, step.parse().expect("a step"))
    })
}

/// Handles as text, unless all of them are empty.
fn told(name: &str, handles: &[Handle]) -> String {
    let handles: Vec<_> = handles.iter().map(Handle::as_str).collect();
    if handles.iter().all(|handle| handle.is_empty()) {
        return String::new();
    }
    format!("{name}={handles:?}")
}
