//! Random schedules of a group's ranks, held against the invariants of gathering and voting (see
//! the crate's documentation).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use torchft_quorum::gather::{Failure, FailureKind, Gather, GatherEffect, Group, RankAsk, Round};
use torchft_quorum::member::{Member, Quorum, Ticket};
use torchft_quorum::vote::{Ballot, Outcome, Vote, VoteEffect};

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
    Vote(Ballot),
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
            Event::Vote(Ballot { group_rank, step, commit })
        }),
        1 => any::<usize>().prop_map(Event::LeaveVote),
        1 => any::<usize>().prop_map(Event::GiveUpVote),
    ]
}

/// A group, and a plain account of what it was told.
struct Schedule {
    world_size: i64,
    gather: Gather,
    vote: Vote,
    now: Duration,
    tickets: u64,
    asking: BTreeMap<Ticket, RankAsk>,
    voting: BTreeMap<Ticket, Ballot>,
    /// The request to the lighthouse that is on its way.
    in_flight: Option<(Round, Member)>,
    round: Round,
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
            vote: Vote::new(world_size as u64),
            now: Duration::ZERO,
            tickets: 0,
            asking: BTreeMap::new(),
            voting: BTreeMap::new(),
            in_flight: None,
            round: Round(0),
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
                if let Some(ticket) = nth(&self.asking, i) {
                    self.asking.remove(&ticket);
                    let effects = self.gather.leave(ticket);
                    self.carry_out(effects);
                    assert!(self.asking.is_empty(), "a broken round has callers");
                }
            }
            Event::GiveUp(i) => {
                if let Some(ticket) = nth(&self.asking, i) {
                    let effects = self.gather.give_up(ticket);
                    self.carry_out(effects);
                    assert!(self.asking.is_empty(), "a broken round has callers");
                }
            }
            Event::Answer { late, kind, ahead } => self.answer(late, kind, ahead),
            Event::Pass(ms) => self.pass(Duration::from_millis(ms)),
            Event::Vote(ballot) => self.cast(ballot),
            Event::LeaveVote(i) => {
                if let Some(ticket) = nth(&self.voting, i) {
                    self.voting.remove(&ticket);
                    let effects = self.vote.leave(ticket);
                    self.count(&effects);
                    assert!(self.voting.is_empty(), "somebody waits for one who left");
                }
            }
            Event::GiveUpVote(i) => {
                if let Some(ticket) = nth(&self.voting, i) {
                    let effects = self.vote.give_up(ticket);
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
            settling: false,
            commit_failures: 0,
            deadline: self.now + Duration::from_millis(patience_ms),
        };
        let ticket = self.ticket();
        self.asking.insert(ticket, ask.clone());
        let effects = self.gather.ask(ticket, ask, self.now);
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
        let last =
            kind.is_none_or(|kind| !matches!(kind, FailureKind::Unreachable | FailureKind::Failed));
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
            let (deadline, ticket) = first.map(|(ticket, ask)| (ask.deadline, *ticket)).unzip();
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
            let effects = match ticket {
                Some(ticket) if deadline == Some(at) => self.gather.give_up(ticket),
                _ => self.gather.tick(at),
            };
            self.carry_out(effects);
        }
        self.now = end;
    }

    fn cast(&mut self, ballot: Ballot) {
        let ticket = self.ticket();
        self.voting.insert(ticket, ballot);
        let effects = self.vote.vote(ticket, ballot);
        self.count(&effects);
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn carry_out(&mut self, effects: Vec<GatherEffect>) {
        for effect in effects {
            match effect {
                GatherEffect::RoundBegins(round) => {
                    assert!(round > self.round);
                    self.round = round;
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
                GatherEffect::Answer { ticket, .. } | GatherEffect::Refuse { ticket, .. } => {
                    assert!(
                        self.asking.remove(&ticket).is_some(),
                        "nobody waits on {ticket:?}"
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
        let ballots: Vec<_> = effects.iter().map(|effect| self.answered(effect)).collect();
        if outcomes.first().is_some_and(|outcome| outcome.commits()) {
            let yes = effects
                .iter()
                .zip(&ballots)
                .filter(|(e, _)| outcome(e).is_some());
            let yes: Vec<_> = yes.map(|(_, ballot)| ballot).collect();
            let ranks: BTreeSet<i64> = yes.iter().map(|ballot| ballot.group_rank).collect();
            assert_eq!(ranks.len() as i64, self.world_size);
            assert!(
                yes.iter()
                    .all(|ballot| ballot.commit && ballot.step == yes[0].step)
            );
        }
        let steps: BTreeSet<i64> = self.voting.values().map(|ballot| ballot.step).collect();
        assert!(steps.len() <= 1, "votes of different steps meet");
        assert!(
            (self.voting.len() as i64) < self.world_size,
            "all have voted, nobody is told"
        );
    }

    fn answered(&mut self, effect: &VoteEffect) -> Ballot {
        let (VoteEffect::Answer { ticket, .. } | VoteEffect::Refuse { ticket, .. }) = effect;
        self.voting.remove(ticket).expect("somebody waits on it")
    }
}

fn outcome(effect: &VoteEffect) -> Option<&Outcome> {
    match effect {
        VoteEffect::Answer { outcome, .. } => Some(outcome),
        VoteEffect::Refuse { .. } => None,
    }
}

fn nth<T>(waiting: &BTreeMap<Ticket, T>, i: usize) -> Option<Ticket> {
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
        let mut vote = Vote::new(3);
        for (step, votes) in steps.iter().enumerate() {
            let ballots = votes.iter().enumerate().map(|(rank, commit)| Ballot {
                group_rank: rank as i64, step: step as i64, commit: *commit,
            });
            let ballots: Vec<_> = ballots.collect();
            let mut told = Vec::new();
            for (i, ballot) in ballots.into_iter().enumerate() {
                told.extend(vote.vote(Ticket(step as u64 * 3 + i as u64), ballot));
            }
            let told: Vec<_> = told.iter().filter_map(outcome).map(Outcome::commits).collect();
            prop_assert_eq!(told, vec![votes.iter().all(|yes| *yes); 3]);
        }
    }
}
