//! Random schedules of a lighthouse, held against its invariants (see the crate's documentation).

use std::time::Duration;

use audit::Audit;
use proptest::prelude::*;
use torchft_quorum::coordinator::Coordinator;
use torchft_quorum::effect::Effect;
use torchft_quorum::member::{CallId, Member, ReplicaId};
use torchft_quorum::rules::Rules;

mod audit;

const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(1000);
const GROUPS: usize = 5;

/// One event. Groups are numbers; a group that starts anew has a new id.
#[derive(Clone, Debug)]
enum Event {
    Heartbeat(usize),
    /// How the group's step differs from that of its last quorum, and what it wishes.
    Join {
        group: usize,
        ahead: i64,
        shrink_only: bool,
        failed: bool,
        init_sync: Option<bool>,
        knows_last: bool,
    },
    Leave(usize),
    GiveUp(usize),
    Pass(u64),
    /// Everybody heartbeats while time passes.
    PassAlive(u64),
    /// The lighthouse does not run.
    Pause(u64),
    StartAnew {
        group: usize,
        step: i64,
        renamed: bool,
    },
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    let group = 0..GROUPS;
    let ahead = prop_oneof![6 => Just(1i64), 2 => Just(0), 1 => -3i64..4];
    let wishes = (
        prop::bool::weighted(0.05),
        prop::bool::weighted(0.2),
        prop::option::of(any::<bool>()),
        any::<bool>(),
    );
    prop_oneof![
        8 => group.clone().prop_map(Event::Heartbeat),
        24 => (group.clone(), ahead, wishes).prop_map(
            |(group, ahead, (shrink_only, failed, init_sync, knows_last))| Event::Join {
                group, ahead, shrink_only, failed, init_sync, knows_last,
            }
        ),
        2 => any::<usize>().prop_map(Event::Leave),
        2 => any::<usize>().prop_map(Event::GiveUp),
        4 => (0u64..700).prop_map(Event::Pass),
        4 => (0u64..3000).prop_map(Event::PassAlive),
        1 => (0u64..5000).prop_map(Event::Pause),
        2 => (group, 0i64..4, any::<bool>())
            .prop_map(|(group, step, renamed)| Event::StartAnew { group, step, renamed }),
        1 => Just(Event::Restart),
    ]
}

fn rules() -> impl Strategy<Value = Rules> {
    (1..=3usize, prop_oneof![Just(0u64), 1..5000u64]).prop_map(|(min_replicas, join_ms)| Rules {
        min_replicas,
        join_timeout: Duration::from_millis(join_ms),
        heartbeat_timeout: HEARTBEAT_TIMEOUT,
    })
}

/// The coordinator, the groups that call it, and the audit that checks it.
struct Schedule {
    coordinator: Coordinator,
    audit: Audit,
    now: Duration,
    ids: Vec<ReplicaId>,
    addresses: Vec<String>,
    steps: Vec<i64>,
    call_ids: u64,
    starts: u64,
}

impl Schedule {
    fn new(rules: Rules) -> Self {
        Self {
            coordinator: Coordinator::new(rules, 0).expect("good rules"),
            audit: Audit::new(rules, 0),
            now: Duration::ZERO,
            ids: (0..GROUPS).map(|i| format!("g{i}:0").into()).collect(),
            addresses: vec![String::new(); GROUPS],
            steps: vec![0; GROUPS],
            call_ids: 0,
            starts: 0,
        }
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Heartbeat(group) => self.heartbeat(group),
            Event::Join { .. } => self.join(&event),
            Event::Leave(i) => self.leave(i),
            Event::GiveUp(i) => self.give_up(i),
            Event::Pass(ms) => self.pass(Duration::from_millis(ms)),
            Event::PassAlive(ms) => self.pass_alive(ms),
            Event::Pause(ms) => self.pause(Duration::from_millis(ms)),
            Event::StartAnew {
                group,
                step,
                renamed,
            } => {
                self.starts += 1;
                self.addresses[group] = format!("http://{}", self.starts);
                self.steps[group] = step;
                if renamed {
                    self.ids[group] = format!("g{group}:{}", self.starts).into();
                }
            }
            Event::Restart => {
                let rules = *self.coordinator.rules();
                let epoch = self.audit.highest_id() + 1000;
                self.coordinator = Coordinator::new(rules, epoch).expect("good rules");
                self.audit.restart(epoch);
            }
        }
    }

    fn heartbeat(&mut self, group: usize) {
        let id = self.ids[group].clone();
        self.audit.heartbeat(&id, self.now);
        let effects = self.coordinator.heartbeat(id.as_str(), self.now);
        self.check(&effects);
    }

    fn join(&mut self, event: &Event) {
        let Event::Join {
            group,
            ahead,
            shrink_only,
            failed,
            init_sync,
            knows_last,
        } = *event
        else {
            return;
        };
        let id = self.ids[group].clone();
        let own = self.steps[group];
        // One that failed has neither healed nor taken a step; a new process is where it starts.
        let healed = self
            .audit
            .step_of(&id, &self.addresses[group])
            .unwrap_or(own)
            + ahead;
        let step = if failed { own } else { healed };
        let member = Member {
            shrink_only,
            commit_failures: i64::from(failed),
            init_sync,
            address: self.addresses[group].clone(),
            ..Member::new(id, step.max(0))
        };
        self.steps[group] = member.step;
        self.call_ids += 1;
        let call_id = CallId(self.call_ids);
        let seen = if knows_last {
            self.audit.highest_id()
        } else {
            0
        };
        self.audit.join(call_id, &member, seen, self.now);
        let effects = self.coordinator.join(call_id, member, seen, self.now);
        self.check(&effects);
    }

    /// One who hangs up gets no answer.
    fn leave(&mut self, i: usize) {
        if let Some(call_id) = self.audit.any_call(i) {
            self.audit.leave(call_id);
            let effects = self.coordinator.leave(call_id, self.now);
            self.check(&effects);
        }
    }

    /// One whose deadline has passed gets one, of whatever kind.
    fn give_up(&mut self, i: usize) {
        if let Some(call_id) = self.audit.any_call(i) {
            let effects = self.coordinator.give_up(call_id, self.now);
            self.check(&effects);
            assert!(!self.audit.waits(call_id));
        }
    }

    /// Time passes; the coordinator has nothing to do before it asks to be woken.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.coordinator.next_wake().filter(|at| *at <= end) {
            let before = at.saturating_sub(Duration::from_nanos(1)).max(self.now);
            if before < at {
                let early = self.coordinator.tick(before);
                assert_eq!(early, [], "had something to do before its time");
            }
            self.now = at;
            let effects = self.coordinator.tick(at);
            self.check(&effects);
        }
        self.now = end;
        let effects = self.coordinator.tick(end);
        self.check(&effects);
    }

    fn pass_alive(&mut self, ms: u64) {
        for _ in 0..ms / 400 {
            (0..GROUPS).for_each(|group| self.heartbeat(group));
            self.pass(Duration::from_millis(400));
        }
    }

    /// What was to happen meanwhile comes all at once, and nobody has fallen silent by it.
    fn pause(&mut self, gap: Duration) {
        self.audit.pause(gap, self.now);
        self.now += gap;
        let effects = self.coordinator.tick(self.now);
        self.check(&effects);
    }

    fn check(&mut self, effects: &[Effect]) {
        self.audit.check(effects, self.now);
    }

    /// Everybody goes: requests first, then heartbeats.
    fn drain(&mut self) {
        while self.audit.any_call(0).is_some() {
            self.leave(0);
        }
        for _ in 0..3 {
            self.pass(HEARTBEAT_TIMEOUT * 11);
        }
        let last = self
            .coordinator
            .last_quorum()
            .map_or(0, |q| q.members.len());
        assert!(self.coordinator.status(self.now).replicas.len() <= last);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_schedule_keeps_the_invariants(
        rules in rules(),
        events in prop::collection::vec(event(), 1..120),
    ) {
        let mut schedule = Schedule::new(rules);
        for event in events {
            schedule.run(event);
        }
        schedule.drain();
    }

    /// Without anything unusual, groups that go on asking get one quorum a round.
    #[test]
    fn a_quiet_run_forms_a_quorum_each_round(
        groups in 1..GROUPS,
        orders in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
    ) {
        let rules = Rules {
            min_replicas: groups,
            join_timeout: Duration::from_secs(60),
            heartbeat_timeout: HEARTBEAT_TIMEOUT,
        };
        let mut schedule = Schedule::new(rules);
        let rounds = orders.len();
        for order in orders {
            let first = order.index(groups);
            for i in 0..groups {
                let group = (first + i) % groups;
                schedule.run(Event::Join {
                    group, ahead: 1, shrink_only: false, failed: false,
                    init_sync: Some(false), knows_last: true,
                });
            }
        }
        prop_assert_eq!(schedule.audit.quorums, rounds);
        prop_assert_eq!(schedule.coordinator.last_quorum().map(|q| q.id), Some(1));
    }
}
