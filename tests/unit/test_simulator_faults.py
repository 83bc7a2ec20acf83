"""What a network model says of nodes and links, and which events a fault schedule brings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Joins, check_events
from torchft.simulator.faults import (
    FaultEvent,
    FaultSchedule,
    RandomFailures,
    parse_trace,
    read_trace,
)
from torchft.simulator.network import NetworkModel, NodeProfile


def dies(node: int, step: int | None = None, **more: object) -> FaultEvent:
    return FaultEvent(node=node, event="dies", step=step, **more)  # type: ignore[arg-type]


def joins(node: int, step: int | None = None, **more: object) -> FaultEvent:
    return FaultEvent(node=node, event="joins", step=step, **more)  # type: ignore[arg-type]


def test_the_last_node_stands_for_all_further_ones() -> None:
    network = NetworkModel(nodes=[NodeProfile(step_s=1.0), NodeProfile(step_s=2.0)])
    assert [network.of(node).step_s for node in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_a_node_twice_as_fast_takes_half_of_what_was_measured() -> None:
    assert NodeProfile(speed=2.0).seconds_a_step(0.5) == 0.25


def test_a_speed_without_a_measurement_is_refused() -> None:
    with pytest.raises(SettingsError, match="give step_s"):
        NodeProfile(speed=2.0).seconds_a_step(None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"up_bps": 0}, "up_bps=0: it must be a number, above 0"),
        ({"down_bps": -1}, "down_bps=-1: it must be a number, above 0"),
        ({"latency_s": -0.1}, "latency_s=-0.1: it must be a number, at least 0"),
        ({"step_s": 0}, "step_s=0: it must be a number, above 0"),
        ({"speed": float("nan")}, "speed=nan: it must be a finite number, above 0"),
        ({"step_s": 1.0, "speed": 2.0}, "give step_s, or a speed"),
    ],
)
def test_a_node_that_cannot_be_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        NodeProfile(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"event": "sleeps", "step": 1}, "neither dies nor joins"),
        ({"event": "dies"}, "either step or time_s"),
        ({"event": "dies", "step": 1, "time_s": 1.0}, "either step or time_s"),
        ({"event": "dies", "step": -1}, "steps count from 0"),
        ({"event": "dies", "time_s": float("inf")}, "is no time"),
        ({"event": "joins", "step": 1, "in_round": True}, "leave in_round out"),
    ],
)
def test_an_event_that_cannot_be_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        FaultEvent(node=1, **wrong)  # type: ignore[arg-type]


def test_events_come_in_the_order_of_their_steps() -> None:
    faults = FaultSchedule(events=[joins(1, 60), dies(1, 40, in_round=True)])
    assert faults.to_events(2, 100) == [
        Dies(node=1, step=40, in_round=True),
        Joins(node=1, step=60),
    ]


def test_what_is_later_than_the_run_does_not_happen() -> None:
    assert FaultSchedule(events=[dies(1, 99), joins(1, 100)]).to_events(2, 100) == [Dies(1, 99)]


def test_a_relief_that_comes_in_the_step_of_a_death_is_there_in_time() -> None:
    faults = FaultSchedule(events=[dies(0, 5), joins(1, 5)])
    assert faults.to_events(2, 10) == [Joins(1, 5), Dies(0, 5)]


@pytest.mark.parametrize(
    "events",
    [
        [dies(1, 1), dies(1, 2)],
        [dies(1, 1), joins(1, 2), joins(1, 3)],
        [dies(2, 1)],
        [dies(0, 1), dies(1, 1)],
        [joins(0, 1), joins(1, 1)],
    ],
    ids=["dies twice", "joins twice", "no such node", "nobody left", "nobody at the start"],
)
def test_a_story_that_cannot_happen_is_refused(events: list[FaultEvent]) -> None:
    with pytest.raises(SettingsError):
        FaultSchedule(events=events).to_events(2, 10)


def test_a_time_becomes_a_step_by_the_slowest_nodes_pace() -> None:
    network = NetworkModel(nodes=[NodeProfile(step_s=0.5), NodeProfile(step_s=2.0)])
    faults = FaultSchedule(events=[dies(1, time_s=8.0), joins(1, time_s=8.5)])
    assert faults.to_events(2, 100, network) == [Dies(1, 4), Joins(1, 5)]


def test_a_time_becomes_a_step_by_the_given_pace() -> None:
    assert FaultSchedule(events=[dies(1, time_s=3.0)], pace_s=0.1).to_events(2, 100) == [
        Dies(1, 30)
    ]


def test_a_time_without_a_pace_is_refused() -> None:
    with pytest.raises(SettingsError, match="give pace_s"):
        FaultSchedule(events=[dies(1, time_s=8.0)]).to_events(2, 100, NetworkModel())


def test_chance_and_a_script_do_not_mix() -> None:
    with pytest.raises(SettingsError, match="not both"):
        FaultSchedule(events=[dies(1, 1)], failures=RandomFailures(rate=0.1))


@given(
    rate=st.floats(0, 1),
    away=st.integers(1, 30),
    in_round=st.floats(0, 1),
    seed=st.integers(0, 1000),
    nodes=st.integers(1, 6),
)
def test_chance_never_tells_an_impossible_story(
    rate: float, away: int, in_round: float, seed: int, nodes: int
) -> None:
    failures = RandomFailures(rate=rate, away_steps=away, in_round=in_round, seed=seed)
    events = FaultSchedule(failures=failures).to_events(nodes, 60)
    check_events(nodes, events)
    assert events == FaultSchedule(failures=failures).to_events(nodes, 60)
    assert all(event.node != 0 for event in events)


def test_a_rate_is_met_on_average() -> None:
    deaths = [
        event
        for event in RandomFailures(rate=0.05, away_steps=1, seed=3).draw(11, 1000)
        if event.event == "dies"
    ]
    # 10 nodes, and a cycle of 20 steps until the failure and 1 away: 10 * 1000 / 21.
    assert 410 <= len(deaths) <= 540


def test_another_seed_is_another_schedule() -> None:
    drawn = [RandomFailures(rate=0.05, seed=seed).draw(4, 200) for seed in (0, 1)]
    assert drawn[0] != drawn[1]


CSV = """\
step, node, event, in_round
40, 1, dies, true
60, 1, joins,
"""
JSON = """\
{"time_s": 12.5, "node": 1, "event": "dies"}

{"time_s": 30, "node": 1, "event": "joins"}
"""


def test_a_trace_in_csv() -> None:
    read = parse_trace(CSV, source="t.csv", as_csv=True)
    assert read == [dies(1, 40, in_round=True), joins(1, 60)]


def test_a_trace_in_json_lines() -> None:
    read = parse_trace(JSON, source="t", as_csv=False)
    assert read == [dies(1, time_s=12.5), joins(1, time_s=30.0)]


def test_a_trace_file_joins_the_events(tmp_path: Path) -> None:
    path = tmp_path / "failures.csv"
    path.write_text(CSV)
    faults = FaultSchedule(trace=path, events=[joins(2, 10)])
    assert faults.to_events(3, 100) == [
        Joins(2, 10),
        Dies(1, 40, in_round=True),
        Joins(1, 60),
    ]


@pytest.mark.parametrize(
    ("text", "as_csv", "said"),
    [
        ("step,node,event\n1,1,dies\nx,1,joins\n", True, "t:3 is no event: .*'x'"),
        ("step,node,event,why\n1,1,dies,power\n", True, "t:2 .*no column why"),
        ("step,node\n1,1\n", True, "t:2 .*event missing"),
        ("step,node,event\n1,1,dies,8\n", True, "t:2 .*no column None"),
        ('{"step": 1, "node": 1.5, "event": "dies"}', False, "t:1 .*1.5: it must be an integer"),
        ('{"step": 1, "node": 0', False, "t:1 is no JSON"),
        ("[1]", False, "t:1 is no JSON object"),
        (
            '{"step": 1, "node": 0, "event": "dies", "in_round": "maybe"}',
            False,
            "it must be one of 1, true",
        ),
    ],
)
def test_a_bad_line_is_named(text: str, as_csv: bool, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_trace(text, source="t", as_csv=as_csv)


def test_a_missing_trace_is_named() -> None:
    with pytest.raises(SettingsError, match=r"cannot read the trace absent\.csv"):
        read_trace("absent.csv")


def test_an_event_of_a_node_that_there_is_not_is_refused_even_if_it_comes_after_the_end() -> None:
    with pytest.raises(SettingsError, match=r"node=9.*the nodes are 0 to 2"):
        FaultSchedule(events=[dies(9, 1000)]).to_events(3, 40)


def test_the_old_weather_is_a_network_with_its_faults() -> None:
    with pytest.warns(DeprecationWarning, match="Weather is now"):
        from torchft.simulator import Weather

    old = Weather(nodes=[NodeProfile(step_s=2.0)], events=[dies(1, time_s=8.0)], pace_s=0.5)
    assert old.of(0).step_s == 2.0
    assert old.faults.to_events(2, 100) == [Dies(1, 16)]


def test_a_network_without_nodes_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least one node"):
        NetworkModel(nodes=[])
