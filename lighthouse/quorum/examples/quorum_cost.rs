//! Prints what a quorum of many groups costs in the core alone, from the first join to the answers:
//! `cargo run --release -p torchft-quorum --example quorum_cost`.

use std::time::{Duration, Instant};

use torchft_quorum::coordinator::Coordinator;
use torchft_quorum::member::{CallId, Member, ReplicaId};
use torchft_quorum::rules::{BadRules, Rules};

const ROUNDS: u64 = 200;

fn main() -> Result<(), BadRules> {
    println!("groups  µs a quorum  µs a heartbeat  ids looked at a join");
    for groups in [2, 8, 32, 128, 512, 2048] {
        measure(groups)?;
    }
    Ok(())
}

fn measure(groups: u64) -> Result<(), BadRules> {
    let rules = Rules {
        min_replicas: groups as usize,
        join_timeout: Duration::from_secs(60),
        heartbeat_timeout: Duration::from_secs(5),
    };
    let mut coordinator = Coordinator::new(rules, 0)?;
    let ids: Vec<ReplicaId> = (0..groups)
        .map(|i| format!("group_{i:04}:0").into())
        .collect();
    let begun = Instant::now();
    for round in 0..ROUNDS {
        for (i, id) in ids.iter().enumerate() {
            let call_id = CallId(round * groups + i as u64);
            let member = Member::new(id.clone(), round as i64);
            coordinator.join(call_id, member, 0, begun.elapsed());
        }
    }
    let quorums = begun.elapsed().as_secs_f64() * 1e6 / ROUNDS as f64;
    let visits = coordinator.visits() as f64 / (ROUNDS * groups) as f64;
    let begun_beating = Instant::now();
    for id in ids.iter().cycle().take((ROUNDS * groups) as usize) {
        coordinator.heartbeat(id.as_str(), begun.elapsed());
    }
    let beats = begun_beating.elapsed().as_secs_f64() * 1e6 / (ROUNDS * groups) as f64;
    println!("{groups:6}  {quorums:11.1}  {beats:14.3}  {visits:20.2}");
    Ok(())
}
