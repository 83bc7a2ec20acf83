//! What a decision costs does not grow with the number of groups: only a new quorum looks at all of
//! them. `examples/quorum_cost.rs` prints the time.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use torchft_quorum::machine::Machine;
use torchft_quorum::member::{Member, Ticket};
use torchft_quorum::rules::Rules;

const GROUPS: u64 = 512;

fn lighthouse(min_replicas: usize) -> Machine {
    let rules = Rules {
        min_replicas,
        join_timeout: Duration::from_secs(60),
        heartbeat_timeout: Duration::from_secs(5),
    };
    Machine::new(rules, 0).unwrap()
}

/// All groups ask at `step`; returns how many quorums that made.
fn round(machine: &mut Machine, step: u64, now: Duration) -> usize {
    let joins = (0..GROUPS).map(|i| {
        let member = Member::new(format!("group_{i:04}"), step as i64);
        machine
            .join(Ticket(step * GROUPS + i), member, 0, now)
            .len()
    });
    joins.sum()
}

#[test]
fn a_quorum_of_512_looks_at_each_id_a_few_times() {
    let mut machine = lighthouse(GROUPS as usize);
    let rounds = 10;
    for step in 0..rounds {
        assert_eq!(round(&mut machine, step, Duration::ZERO), 1);
    }
    assert!(
        machine.looks() <= rounds * GROUPS * 3,
        "{} looks",
        machine.looks()
    );
}

#[test]
fn heartbeats_look_at_nobody_else() {
    let mut machine = lighthouse(1);
    for beat in 0..100 {
        for i in 0..GROUPS {
            let now = Duration::from_millis(beat * 100);
            machine.heartbeat(&format!("group_{i:04}"), now);
        }
    }
    // 10 s with an alarm at most each 5 s for each id.
    assert!(machine.looks() <= GROUPS * 2, "{} looks", machine.looks());
}
