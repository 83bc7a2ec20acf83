//! What a decision costs does not grow with the number of groups: only a new quorum visits all of
//! them. `examples/quorum_cost.rs` prints the time.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use torchft_quorum::coordinator::Coordinator;
use torchft_quorum::member::{CallId, Member};
use torchft_quorum::rules::Rules;

const GROUPS: u64 = 512;

fn lighthouse(min_replicas: usize) -> Coordinator {
    let rules = Rules {
        min_replicas,
        join_timeout: Duration::from_secs(60),
        heartbeat_timeout: Duration::from_secs(5),
    };
    Coordinator::new(rules, 0).unwrap()
}

/// All groups ask at `step`; returns how many quorums that made.
fn round(coordinator: &mut Coordinator, step: u64, now: Duration) -> usize {
    let joins = (0..GROUPS).map(|i| {
        let member = Member::new(format!("group_{i:04}"), step as i64);
        coordinator
            .join(CallId(step * GROUPS + i), member, 0, now)
            .len()
    });
    joins.sum()
}

#[test]
fn a_quorum_of_512_looks_at_each_id_a_few_times() {
    let mut coordinator = lighthouse(GROUPS as usize);
    let rounds = 10;
    for step in 0..rounds {
        assert_eq!(round(&mut coordinator, step, Duration::ZERO), 1);
    }
    assert!(
        coordinator.visits() <= rounds * GROUPS * 3,
        "{} visits",
        coordinator.visits()
    );
}

#[test]
fn heartbeats_look_at_nobody_else() {
    let mut coordinator = lighthouse(1);
    for beat in 0..100 {
        for i in 0..GROUPS {
            let now = Duration::from_millis(beat * 100);
            coordinator.heartbeat(&format!("group_{i:04}"), now);
        }
    }
    // In 10 s each replica is checked at most every 5 s.
    assert!(
        coordinator.visits() <= GROUPS * 2,
        "{} visits",
        coordinator.visits()
    );
}
