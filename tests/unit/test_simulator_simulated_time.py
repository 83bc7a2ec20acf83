"""What a run takes in simulated time. Times are small whole numbers, so that a reader can add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.peers import Place
from torchft.simulator.clocks import NodeSeconds, heal_seconds, round_seconds
from torchft.simulator.events import Dies
from torchft.simulator.network import NetworkModel, NodeProfile
from torchft.simulator.round_records import HealRecord, RoundRecord
from torchft.simulator.simulated_time import Forecast, forecast_records, smoothed


def round_of(
    step: int,
    members: tuple[int, ...] = (0, 1),
    nbytes: int = 0,
    committed: bool = True,
    place: Place = Place.AFTER,
    kind: str = "average",
    counted: tuple[int, ...] = (),
    **more: Any,
) -> RoundRecord:
    """One in which each member sent `nbytes`."""
    return RoundRecord(
        step,
        place,
        kind,
        members,
        counted or members,
        committed,
        dict.fromkeys(members, nbytes),
        **more,
    )


def run(
    network: NetworkModel,
    steps: int,
    rounds: Sequence[RoundRecord] = (),
    *,
    nodes: int = 2,
    away: dict[int, range] | None = None,
    **more: Any,
) -> Forecast:
    """`away`: steps that a node does not compute. The loss of a step is 10 minus its number."""
    gone = away or {}
    losses = [
        {node: 10.0 - step for node in range(nodes) if step not in gone.get(node, range(0))}
        for step in range(steps)
    ]
    return forecast_records(num_nodes=nodes, losses=losses, rounds=rounds, network=network, **more)


def unequal(**link: float) -> NetworkModel:
    """Node 0 takes 1 s a step, node 1 takes 3 s."""
    nodes = [NodeProfile(step_s=1.0, **link), NodeProfile(step_s=3.0, **link)]
    return NetworkModel(nodes=nodes, heartbeat_timeout_s=5.0)


def test_alone_a_node_only_computes() -> None:
    records = [round_of(step, members=(0,), nbytes=1000) for step in range(4)]
    slow = NetworkModel(nodes=[NodeProfile(step_s=2.0, up_bps=1, down_bps=1, latency_s=100)])
    simulated = run(slow, 4, records, nodes=1)
    assert simulated.nodes == (NodeSeconds(compute_s=8.0),)
    assert (simulated.elapsed_s, simulated.utilisation) == (8.0, 1.0)


def test_the_fast_node_waits_for_the_slow_one_in_each_round() -> None:
    simulated = run(unequal(), 4, [round_of(1), round_of(3)])
    assert simulated.nodes[0] == NodeSeconds(compute_s=4.0, wait_s=8.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=12.0)
    assert simulated.step_ends_s == [3.0, 6.0, 9.0, 12.0]
    assert simulated.utilisation == 16 / 24


def test_without_rounds_it_waits_at_the_end_only() -> None:
    simulated = run(unequal(), 2)
    assert simulated.steps[0].nodes[0] == NodeSeconds(compute_s=1.0)
    assert simulated.nodes[0] == NodeSeconds(compute_s=2.0, wait_s=4.0)


@pytest.mark.parametrize(
    ("kind", "members", "collectives", "messages"),
    [("average", 2, 1, 2), ("average", 4, 3, 18), ("ordered", 4, 1, 6), ("gather", 4, 2, 6)],
)
def test_latencies_add_up_by_the_pattern(
    kind: str, members: int, collectives: int, messages: int
) -> None:
    record = round_of(0, members=tuple(range(members)), kind=kind, collectives=collectives)
    links = [NodeProfile(latency_s=0.5)] * members
    assert round_seconds(record, links) == messages * 0.5


@pytest.mark.parametrize("slow", [{"up_bps": 8.0}, {"down_bps": 8.0}])
def test_the_slowest_link_sets_the_pace_of_the_bytes(slow: dict[str, float]) -> None:
    links = [NodeProfile(up_bps=800, down_bps=800), NodeProfile(**slow), NodeProfile()]
    assert round_seconds(round_of(0, members=(0, 1, 2), nbytes=100), links) == 100.0
    assert round_seconds(round_of(0, members=(0, 2), nbytes=100), links) == 1.0


def test_a_heal_takes_the_slower_of_both_directions() -> None:
    assert heal_seconds(100, NodeProfile(up_bps=80), NodeProfile(down_bps=800)) == 10.0
    assert heal_seconds(100, NodeProfile(up_bps=800), NodeProfile(down_bps=80)) == 10.0
    assert heal_seconds(100, NodeProfile(up_bps=80, latency_s=1), NodeProfile(), 2) == 21.0


def test_a_death_between_rounds_delays_the_next_one_by_the_heartbeat_timeout() -> None:
    rounds = [round_of(0), round_of(1, members=(0,))]
    network = replace(unequal(), nodes=[NodeProfile(step_s=1.0)])
    simulated = run(network, 2, rounds, away={1: range(1, 2)}, deaths=[Dies(1, 1)])
    # Dead at 1 s, known at 6 s.
    assert simulated.nodes[0] == NodeSeconds(compute_s=2.0, wait_s=4.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=1.0, away_s=5.0)
    assert simulated.lost.deaths == 1
    assert simulated.lost.node_steps == 0


def test_a_death_in_a_round_costs_the_survivors_the_timeout_and_all_their_work() -> None:
    records = [round_of(3, committed=False), round_of(7, members=(0,))]
    simulated = run(
        unequal(), 8, records, away={1: range(4, 8)}, deaths=[Dies(1, 2, in_round=True)]
    )
    # They meet at 12 s; node 0 goes on at 17 s.
    assert simulated.nodes[0] == NodeSeconds(compute_s=8.0, wait_s=8.0 + 5.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=12.0, away_s=9.0)
    assert simulated.lost.rounds == 1
    assert simulated.lost.node_steps == 8


def test_one_that_dies_in_the_very_first_round_was_there_until_then() -> None:
    records = [round_of(0, committed=False, place=Place.BEFORE), round_of(1, members=(0,))]
    simulated = run(
        unequal(latency_s=1.0),
        2,
        records,
        away={1: range(2)},
        deaths=[Dies(1, 0, in_round=True)],
    )
    assert simulated.nodes[0] == NodeSeconds(compute_s=2.0, wait_s=5.0)
    assert simulated.nodes[1] == NodeSeconds(wait_s=1.0, away_s=6.0)


def test_a_failed_round_that_restores_nothing_loses_no_work() -> None:
    records = [round_of(3, committed=False, restores=False), round_of(7)]
    lost = run(unequal(), 8, records).lost
    assert (lost.rounds, lost.node_steps) == (1, 0)


def test_a_skipped_step_loses_one_step_of_each_member() -> None:
    records = [
        round_of(step, place=Place.BEFORE, committed=step != 2, restores=False) for step in range(5)
    ]
    simulated = run(unequal(), 5, records)
    assert (simulated.lost.rounds, simulated.lost.node_steps) == (1, 2)


def test_one_that_heals_at_a_round_makes_the_others_wait_for_its_transfer() -> None:
    nodes = [NodeProfile(step_s=1.0, up_bps=8.0, down_bps=8.0)]
    records = [round_of(0, members=(0,)), round_of(1, counted=(0,)), round_of(2)]
    simulated = run(
        NetworkModel(nodes=nodes),
        3,
        records,
        away={1: range(2)},
        heals=[HealRecord(1, 1, 0, nbytes=10)],
    )
    assert simulated.nodes[0] == NodeSeconds(compute_s=3.0, wait_s=10.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=1.0, away_s=2.0, heal_s=10.0)
    assert (simulated.lost.heals, simulated.lost.heal_bytes) == (1, 10)
    assert simulated.bytes_sent == (10, 0)


def test_one_that_heals_before_a_gradient_step_computes_after_its_transfer() -> None:
    nodes = [NodeProfile(step_s=1.0, up_bps=8.0)]
    records = [round_of(0, members=(0,), place=Place.BEFORE), round_of(1, place=Place.BEFORE)]
    simulated = run(
        NetworkModel(nodes=nodes),
        2,
        records,
        away={1: range(1)},
        heals=[HealRecord(1, 1, 0, nbytes=10)],
    )
    assert simulated.nodes[0] == NodeSeconds(compute_s=2.0, wait_s=10.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=1.0, away_s=1.0, heal_s=10.0)


def test_two_that_heal_from_one_share_its_uplink() -> None:
    nodes = [NodeProfile(step_s=1.0, up_bps=8.0)]
    heals = [HealRecord(0, node, 0, nbytes=10) for node in (1, 2)]
    simulated = run(
        NetworkModel(nodes=nodes),
        1,
        [round_of(0, members=(0, 1, 2), counted=(0,))],
        nodes=3,
        away={1: range(1), 2: range(1)},
        heals=heals,
    )
    assert simulated.elapsed_s == 21.0


def slow_uplinks() -> NetworkModel:
    """Node 0 takes 1 s a step, node 1 takes 2 s; both send a byte a second."""
    return NetworkModel(
        nodes=[NodeProfile(step_s=1.0, up_bps=8.0), NodeProfile(step_s=2.0, up_bps=8.0)],
        heartbeat_timeout_s=5.0,
    )


def test_what_travels_beside_training_costs_no_time() -> None:
    simulated = run(slow_uplinks(), 4, [round_of(3, delay=3, nbytes=3)])
    # They meet at 2 s; the average arrives at 5 s, when node 0 closes its round.
    assert simulated.nodes[0] == NodeSeconds(compute_s=4.0, wait_s=4.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=8.0)
    assert simulated.bytes_sent == (3, 3)


def test_what_has_not_arrived_at_the_close_is_waited_for_where_one_is() -> None:
    simulated = run(slow_uplinks(), 4, [round_of(2, delay=2, nbytes=5)])
    # It arrives at 7 s. Node 0 closes the round at 4 s, and node 1 at 6 s.
    assert simulated.nodes[0] == NodeSeconds(compute_s=4.0, wait_s=2.0, communicate_s=3.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=8.0, communicate_s=1.0)
    assert simulated.step_ends_s == [2.0, 4.0, 7.0, 9.0]


def test_a_round_opens_where_the_last_one_closes_and_its_bytes_follow() -> None:
    records = [round_of(1, delay=1, nbytes=4), round_of(2, delay=1, nbytes=4)]
    simulated = run(slow_uplinks(), 3, records)
    # From 2 s to 6 s, and from 6 s, when both have closed the first, to 10 s.
    assert simulated.elapsed_s == 10.0
    assert simulated.nodes[1] == NodeSeconds(compute_s=6.0, communicate_s=4.0)


def test_two_rounds_in_flight_share_the_link_one_after_the_other() -> None:
    records = [round_of(2, delay=0, nbytes=1, recipe=1), round_of(3, delay=3, nbytes=6)]
    simulated = run(slow_uplinks(), 4, records)
    # The first is on its way from 2 s to 8 s: the second, of 1 s, has to follow it.
    assert simulated.steps[2].end_s == 9.0
    assert simulated.elapsed_s == 11.0


def test_a_death_beside_training_is_known_after_the_heartbeat_timeout() -> None:
    records = [round_of(3, delay=3, committed=False)]
    away = {1: range(2, 4)}
    simulated = run(slow_uplinks(), 4, records, away=away, deaths=[Dies(1, 2)])
    # Dead at 4 s, known at 9 s; node 0 closes its round at 5 s.
    assert simulated.nodes[0] == NodeSeconds(compute_s=4.0, wait_s=1.0 + 4.0)
    assert simulated.nodes[1] == NodeSeconds(compute_s=4.0, away_s=5.0)
    assert (simulated.lost.rounds, simulated.lost.deaths) == (1, 1)
    dying = [Dies(1, 0, in_round=True)]
    struck = run(slow_uplinks(), 4, records, away={1: range(1, 4)}, deaths=dying)
    assert struck.nodes[0] == NodeSeconds(compute_s=4.0, wait_s=1.0 + 2.0)


def test_steps_taken_while_a_round_travelled_are_not_in_it() -> None:
    records = [round_of(3, delay=2, restores=True), round_of(7, committed=False)]
    # Two steps since what the first sent, and four more.
    assert run(slow_uplinks(), 8, records).lost.node_steps == 2 * (2 + 4)


def test_time_to_loss_is_the_end_of_the_first_step_that_is_good_enough() -> None:
    simulated = run(unequal(), 10, [round_of(step) for step in range(10)])
    assert simulated.time_to_loss(7.0, window=1) == 12.0
    assert simulated.time_to_loss(7.0, window=3) == 15.0
    assert simulated.time_to_loss(0.5) is None


def test_a_mean_is_there_only_once_its_window_is_full() -> None:
    assert smoothed([4.0, 2.0, 3.0], 2) == [float("inf"), 3.0, 2.5]
    assert smoothed([4.0, 2.0], 10) == [float("inf"), 3.0]
    assert smoothed([], 10) == []


links = st.builds(
    NodeProfile,
    step_s=st.floats(0.01, 10),
    up_bps=st.floats(1, 1e6),
    down_bps=st.floats(1, 1e6),
    latency_s=st.floats(0, 1),
)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """A run of 4 nodes: one dies between rounds, one in a round; both heal."""
    steps, every = 12, draw(st.integers(1, 4))
    delay = draw(st.integers(0, every))
    place = draw(st.sampled_from(Place))
    dead, back = 1, draw(st.integers(2, 6))
    hit = draw(st.integers(0, steps - 1))
    rounds, heals, waiting = [], [], True
    for step in range(every - 1, steps, every):
        late = min(delay, step)
        opened = step - late
        if waiting and opened >= back:
            heals.append(HealRecord(opened, 1, 0, draw(st.integers(0, 10_000))))
            waiting = False
        there = opened < dead or not waiting
        rounds.append(
            round_of(
                step,
                members=(0, 1, 2, 3) if there else (0, 2, 3),
                nbytes=draw(st.integers(0, 10_000)),
                committed=step != hit and not opened < dead <= step,
                place=place,
                kind=draw(st.sampled_from(["average", "gather"])),
                delay=late,
            )
        )
    end = heals[0].step + (place is Place.AFTER) if heals else steps
    away = {1: range(dead, end)}
    return {
        "steps": steps,
        "rounds": rounds,
        "heals": heals,
        "away": away,
        "deaths": [Dies(1, dead)],
        "nodes": 4,
    }


@given(world=worlds(), nodes=st.lists(links, min_size=4, max_size=4), timeout=st.floats(0, 9))
def test_every_nodes_seconds_add_up_to_the_whole(
    world: dict[str, Any], nodes: list[NodeProfile], timeout: float
) -> None:
    simulated = run(NetworkModel(nodes=nodes, heartbeat_timeout_s=timeout), **world)
    for node in simulated.nodes:
        assert node.elapsed_s == pytest.approx(simulated.elapsed_s)
        assert min(vars(node).values()) >= 0
    ends = simulated.step_ends_s
    assert ends == sorted(ends)
    assert ends[-1] <= simulated.elapsed_s
    assert 0 < simulated.utilisation <= 1 + 1e-9


@given(
    world=worlds(),
    nodes=st.lists(links, min_size=4, max_size=4),
    which=st.integers(0, 3),
    change=st.sampled_from(["step_s", "up_bps", "down_bps", "latency_s"]),
    factor=st.floats(1, 10),
)
def test_a_slower_node_or_link_never_finishes_sooner(
    world: dict[str, Any], nodes: list[NodeProfile], which: int, change: str, factor: float
) -> None:
    before = getattr(nodes[which], change)
    value = before / factor if change.endswith("bps") else before * factor
    worse = [*nodes]
    worse[which] = replace(nodes[which], **{change: value})
    good, bad = run(NetworkModel(nodes=nodes), **world), run(NetworkModel(nodes=worse), **world)
    slack = 1e-9 * good.elapsed_s
    pairs = zip(good.step_ends_s, bad.step_ends_s, strict=True)
    assert all(later >= sooner - slack for sooner, later in pairs)
    assert bad.elapsed_s >= good.elapsed_s - slack


@given(world=worlds(), nodes=st.lists(links, min_size=4, max_size=4), more=st.integers(1, 1000))
def test_more_bytes_never_finish_sooner(
    world: dict[str, Any], nodes: list[NodeProfile], more: int
) -> None:
    fuller = [
        replace(r, bytes_per_node={node: sent + more for node, sent in r.bytes_per_node.items()})
        for r in world["rounds"]
    ]
    good = run(NetworkModel(nodes=nodes), **world)
    bad = run(NetworkModel(nodes=nodes), **{**world, "rounds": fuller})
    assert bad.elapsed_s >= good.elapsed_s * (1 - 1e-9)
    assert sum(bad.bytes_sent) > sum(good.bytes_sent)
