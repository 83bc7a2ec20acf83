//! Random schedules of a group's ranks, held against the invariants of gathering and voting (see
//! the crate's documentation).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use torchft_quorum::gather::{Failure, FailureKind, Gather, GatherEffect, Group, RankAsk, Round};
use torchft_quorum::member::{CallId, Handle, Member, Quorum};
use torchft_quorum::vote::{CommitBarrier, Outcome, RankVote, VoteEffect};

/// One rank does something, or time passes.
#[derive(Clone, Debug)]
enum Event {
    Ask {
        rank: i64,
        step: i64,
        patience_ms: u64,
    },
    Leave(usize),
    GiveUp(usize),
    /// An answer to the latest request, or to one of an earlier round.
    Answer {
        late: bool,
        kind: Option<FailureKind>,
        ahead: i64,
    },
    Pass(u64),
    Vote(RankVote),
    LeaveVote(usize),
    GiveUpVote(usize),
}

fn event(world_size: i64) -> impl Strategy<Value = Event> {
    let rank = 0..world_size;
    let step = prop_oneof![6 => Just(5i64), 1 => 4i64..7];
    let kind = prop::option::weighted(
        0.6,
        prop::sample::select(vec![
            FailureKind::Unreachable,
            FailureKind::Failed,
            FailureKind::Refused,
            FailureKind::StateLost,
            FailureKind::Deadline,
        ]),
    );
    prop_oneof![
        10 => (rank.clone(), step.clone(), 1u64..2000)
            .prop_map(|(rank, step, patience_ms)| Event::Ask { rank, step, patience_ms }),
        1 => any::<usize>().prop_map(Event::Leave),
        1 => any::<usize>().prop_map(Event::GiveUp),
        4 => (prop::bool::weighted(0.2), kind, -1i64..2)
            .prop_map(|(late, kind, ahead)| Event::Answer { late, kind, ahead }),
        2 => (0u64..300).prop_map(Event::Pass),
        10 => (rank, step, prop::bool::weighted(0.8)).prop_map(|(group_rank, step, commit)| {
            Event::Vote(RankVote { group_rank, step, commit })
        }),
        1 => any::<usize>().prop_map(Event::LeaveVote),
        1 => any::<usize>().prop_map(Event::GiveUpVote),
    ]
}

/// A group, and a plain account of what it was told.
struct Schedule {
    world_size: i64,
    gather: Gather,
    vote: CommitBarrier,
    now: Duration,
    call_ids: u64,
    asking: BTreeMap<CallId, RankAsk>,
    voting: BTreeMap<CallId, RankVote>,
    /// The request to the lighthouse that is on its way.
    in_flight: Option<(Round, Member)>,
    round: Round,
    /// A request of this round did not reach the lighthouse.
    was_away: bool,
}

impl Schedule {
    fn new(world_size: i64) -> Self {
        Self {
            world_size,
            gather: Gather::new(Group {
                replica_id: "g".into(),
                address: String::new(),
                store_address: String::new(),
                world_size: world_size as u64,
                quorum_retries: 1,
            }),
            vote: CommitBarrier::new(world_size as u64),
            now: Duration::ZERO,
            call_ids: 0,
            asking: BTreeMap::new(),
            voting: BTreeMap::new(),
            in_flight: None,
            round: Round(0),
            was_away: false,
        }
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Ask {
                rank,
                step,
                patience_ms,
            } => self.ask(rank, step, patience_ms),
            Event::Leave(i) => {
                if let Some(call_id) = nth(&self.asking, i) {
                    self.asking.remove(&call_id);
                    let effects = self.gather.leave(call_id);
                    self.carry_out(effects);
                    assert!(self.asking.is_empty(), "a broken round has callers");
                }
            }
            Event::GiveUp(i) => {
                if let Some(call_id) = nth(&self.asking, i) {
                    let effects = self.gather.give_up(call_id);
                    self.carry_out(effects);
                    assert!(self.asking.is_empty(), "a broken round has callers");
                }
            }
            Event::Answer { late, kind, ahead } => self.answer(late, kind, ahead),
            Event::Pass(ms) => self.pass(Duration::from_millis(ms)),
            Event::Vote(rank_vote) => self.cast(rank_vote),
            Event::LeaveVote(i) => {
                if let Some(call_id) = nth(&self.voting, i) {
                    self.voting.remove(&call_id);
                    let effects = self.vote.leave(call_id);
                    self.count(&effects);
                    assert!(self.voting.is_empty(), "somebody waits for one who left");
                }
            }
            Event::GiveUpVote(i) => {
                if let Some(call_id) = nth(&self.voting, i) {
                    let effects = self.vote.give_up(call_id);
                    self.count(&effects);
                    assert!(self.voting.is_empty(), "somebody waits for one who left");
                }
            }
        }
    }

    fn ask(&mut self, group_rank: i64, step: i64, patience_ms: u64) {
        let ask = RankAsk {
            group_rank,
            step,
            checkpoint_metadata: String::new(),
            shrink_only: false,
            init_sync: false,
            final_sync: false,
            commit_failures: 0,
            handle: Handle::default(),
            deadline: self.now + Duration::from_millis(patience_ms),
        };
        let call_id = self.call_id();
        self.asking.insert(call_id, ask.clone());
        let effects = self.gather.ask(call_id, ask, self.now);
        self.carry_out(effects);
        let all_ask = self.asking.len() as i64 == self.world_size;
        assert_eq!(
            all_ask,
            self.in_flight.is_some() || self.gather.next_wake().is_some()
        );
    }

    fn answer(&mut self, late: bool, kind: Option<FailureKind>, ahead: i64) {
        let round = if late {
            Round(self.round.0.saturating_sub(1))
        } else {
            self.round
        };
        let step = self.in_flight.as_ref().map_or(5, |(_, member)| member.step);
        let answer = match kind {
            Some(kind) => Err(Failure {
                kind,
                message: "why".into(),
            }),
            None => Ok(Arc::new(Quorum {
                id: 1,
                members: vec![
                    Arc::new(Member::new("g", step)),
                    Arc::new(Member::new("h", step + ahead)),
                ],
                formed_at: self.now,
            })),
        };
        let expected = self
            .in_flight
            .as_ref()
            .is_some_and(|(sent, _)| *sent == round);
        if expected {
            self.in_flight = None;
        }
        let effects = self.gather.answered(round, answer, self.now);
        assert!(
            expected || effects.is_empty(),
            "a late answer had an effect"
        );
        let last = match kind {
            Some(FailureKind::Unreachable | FailureKind::Failed) => false,
            // After an absence the others had no time to reach the lighthouse again.
            Some(FailureKind::Deadline) => !self.was_away,
            Some(FailureKind::Refused | FailureKind::StateLost) | None => true,
        };
        self.was_away |= expected && kind == Some(FailureKind::Unreachable);
        self.carry_out(effects);
        assert!(
            !expected || !last || self.asking.is_empty(),
            "the last word was not passed on"
        );
    }

    /// Time passes; callers give up at their deadlines.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let first = self.asking.iter().min_by_key(|(_, ask)| ask.deadline);
            let (deadline, call_id) = first.map(|(call_id, ask)| (ask.deadline, *call_id)).unzip();
            let wake = self.gather.next_wake();
            let Some(at) = wake
                .into_iter()
                .chain(deadline)
                .min()
                .filter(|at| *at <= end)
            else {
                break;
            };
            self.now = at;
            let effects = match call_id {
                Some(call_id) if deadline == Some(at) => self.gather.give_up(call_id),
                _ => self.gather.tick(at),
            };
            self.carry_out(effects);
        }
        self.now = end;
    }

    fn cast(&mut self, rank_vote: RankVote) {
        let call_id = self.call_id();
        self.voting.insert(call_id, rank_vote);
        let effects = self.vote.vote(call_id, rank_vote);
        self.count(&effects);
    }

    fn call_id(&mut self) -> CallId {
        self.call_ids += 1;
        CallId(self.call_ids)
    }

    fn carry_out(&mut self, effects: Vec<GatherEffect>) {
        for effect in effects {
            match effect {
                GatherEffect::RoundBegins(round) => {
                    assert!(round > self.round);
                    self.round = round;
                    self.was_away = false;
                    let effects = self.vote.begin();
                    self.count(&effects);
                    assert!(self.voting.is_empty(), "a vote outlived its round");
                }
                GatherEffect::Send {
                    round,
                    member,
                    deadline,
                    ..
                } => {
                    self.check_request(round, &member, deadline);
                    self.in_flight = Some((round, member));
                }
                GatherEffect::Cancel(round) => {
                    assert_eq!(round, self.round);
                    self.in_flight = None;
                }
                GatherEffect::Answer { call_id, .. } | GatherEffect::Refuse { call_id, .. } => {
                    assert!(
                        self.asking.remove(&call_id).is_some(),
                        "nobody waits on {call_id:?}"
                    );
                }
            }
        }
    }

    /// One request at a time; it speaks for all ranks, and ends before the first of them gives up.
    fn check_request(&self, round: Round, member: &Member, deadline: Duration) {
        assert!(self.in_flight.is_none(), "two requests at once");
        assert_eq!(round, self.round);
        let ranks: BTreeSet<i64> = self.asking.values().map(|ask| ask.group_rank).collect();
        assert_eq!(ranks.len() as i64, self.world_size);
        let first = self.asking.values().map(|ask| ask.deadline).min();
        assert!(Some(deadline) <= first, "a request outlives its caller");
        assert!(deadline >= self.now, "a request after its deadline");
        assert_eq!(
            Some(member.step),
            self.asking.values().map(|ask| ask.step).min()
        );
    }

    /// All that wait in one barrier are answered alike, and yes only if each rank said so.
    fn count(&mut self, effects: &[VoteEffect]) {
        let outcomes: Vec<_> = effects.iter().filter_map(outcome).collect();
        assert!(
            outcomes.windows(2).all(|pair| pair[0] == pair[1]),
            "callers disagree"
        );
        let votes: Vec<_> = effects.iter().map(|effect| self.answered(effect)).collect();
        if outcomes.first().is_some_and(|outcome| outcome.commits()) {
            let yes = effects
                .iter()
                .zip(&votes)
                .filter(|(e, _)| outcome(e).is_some());
            let yes: Vec<_> = yes.map(|(_, rank_vote)| rank_vote).collect();
            let ranks: BTreeSet<i64> = yes.iter().map(|rank_vote| rank_vote.group_rank).collect();
            assert_eq!(ranks.len() as i64, self.world_size);
            assert!(
                yes.iter()
                    .all(|rank_vote| rank_vote.commit && rank_vote.step == yes[0].step)
            );
        }
        let steps: BTreeSet<i64> = self
            .voting
            .values()
            .map(|rank_vote| rank_vote.step)
            .collect();
        assert!(steps.len() <= 1, "votes of different steps meet");
        assert!(
            (self.voting.len() as i64) < self.world_size,
            "all have voted, nobody is told"
        );
    }

    fn answered(&mut self, effect: &VoteEffect) -> RankVote {
        let (VoteEffect::Answer { call_id, .. } | VoteEffect::Refuse { call_id, .. }) = effect;
        self.voting.remove(call_id).expect("somebody waits on it")
    }
}

fn outcome(effect: &VoteEffect) -> Option<&Outcome> {
    match effect {
        VoteEffect::Answer { outcome, .. } => Some(outcome),
        VoteEffect::Refuse { .. } => None,
    }
}

fn nth<T>(waiting: &BTreeMap<CallId, T>, i: usize) -> Option<CallId> {
    waiting.keys().nth(i % waiting.len().max(1)).copied()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_schedule_keeps_the_invariants(
        (world_size, events) in (1i64..=3).prop_flat_map(|world_size| {
            (Just(world_size), prop::collection::vec(event(world_size), 1..120))
        }),
    ) {
        let mut schedule = Schedule::new(world_size);
        for event in events {
            schedule.run(event);
        }
    }

    /// Ranks that vote on one step after another are each time told what the votes say.
    #[test]
    fn a_quiet_run_commits_what_all_want(
        steps in prop::collection::vec(prop::collection::vec(any::<bool>(), 3), 1..20),
    ) {
        let mut vote = CommitBarrier::new(3);
        for (step, votes) in steps.iter().enumerate() {
            let cast = votes.iter().enumerate().map(|(rank, commit)| RankVote {
                group_rank: rank as i64, step: step as i64, commit: *commit,
            });
            let mut told = Vec::new();
            for (i, rank_vote) in cast.enumerate() {
                told.extend(vote.vote(CallId(step as u64 * 3 + i as u64), rank_vote));
            }
            let told: Vec<_> = told.iter().filter_map(outcome).map(Outcome::commits).collect();
            prop_assert_eq!(told, vec![votes.iter().all(|yes| *yes); 3]);
        }
    }
}
