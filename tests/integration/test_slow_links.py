"""Groups behind slow links: what averages send fills them, and nobody is taken for dead for that.

Each group lives on a host of its own, behind a modem whose queue is shared by averages and by
heartbeats, quorums and votes; the lighthouse stands in between. Averages are sent by a congestion
control that fills any queue (`reno`), so that the outcome does not hang on this machine's.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hosts import needs_hosts, on
from torch import nn
from world import Group, World

from torchft import settings
from torchft.digest import digest
from torchft.local_sgd import DiLoCo
from torchft.network_namespaces import Host, Link, Network
from torchft.records import StepRecord, read_step_records

pytestmark = needs_hosts
SIDE = 500
DEAD = "somebody is dead"

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)])


def _trains(
    *, megabytes: float, rounds: int, fragments: int = 1, delay: int = 0, every: int = 4, **how: Any
) -> Any:
    """A story: DiLoCo of so many MB, on gradients that differ between the groups."""

    def story(group: Group) -> str:
        each = round(megabytes * 250_000 / fragments / SIDE)
        parts = [nn.Linear(SIDE, each, bias=False) for _ in range(fragments)]
        model = nn.Sequential(*parts)
        inner = torch.optim.SGD(model.parameters(), lr=1e-3)
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        manager = group.manager(use_async_quorum=False)
        # From here on it is waited for; to be silent is to be dead.
        group.world.happen(f"{group.name} is up")
        for number in range(len(group.world.hosts)):
            group.world.wait(f"group_{number} is up")
        with DiLoCo(manager, list(parts), inner, outer, every, fragment_sync_delay=delay, **how):
            while manager.current_step() < rounds:
                for p in model.parameters():
                    p.grad = torch.full_like(p, group.number + 1.0)
                inner.step()
        return digest(dict(model.named_parameters()))

    return story


def _run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, links: Sequence[Link], story: Any, **options: Any
) -> tuple[list[str], list[StepRecord]]:
    """Each group's digest at the end, and all records."""
    monkeypatch.setenv(settings.STEP_RECORDS, str(folder / "steps.jsonl"))
    monkeypatch.setenv(settings.CONGESTION, "reno")
    with Network() as network:
        hosts = [network.host(link) for link in links]
        bind = f"{network.centre.address}:0"
        world = World(folder, hosts=hosts, bind=bind, **options)
        watch = _watched(network.centre, world)
        try:
            digests = on(network.centre, lambda: world.run(*[story] * len(links)), deadline_s=300)
        finally:
            watch.kill()
            watch.join()
        assert not world.happened(DEAD), f"taken for dead: {world.wait(DEAD)}"
        for host in hosts:
            print(host.address, network.sent(host))
    return digests, list(read_step_records(folder / "steps.jsonl"))


def _watched(centre: Host, world: World) -> Any:
    """A process that looks at the lighthouse, and tells who counts as dead at any moment."""

    def looks() -> None:
        centre.enter()
        address = world.wait("lighthouse")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError):  # the lighthouse ends with the run
            while True:
                replicas = json.load(direct.open(f"{address}/status.json"))["replicas"]
                if dead := [one["replica_id"] for one in replicas if not one["healthy"]]:
                    world.happen(DEAD, str(dead))
                time.sleep(0.02)

    process = multiprocessing.get_context("fork").Process(target=looks, daemon=True)
    process.start()
    return process


def _all_went_well(digests: list[str], records: list[StepRecord], rounds: int) -> None:
    assert len(set(digests)) == 1
    assert all(len(record.members) == len(digests) for record in records)
    assert all(record.committed for record in records)
    assert len(records) >= rounds * len(digests)  # one more may have been in flight at the end
    assert len({record.quorum_id for record in records}) == 1


@pytest.mark.parametrize("mbit_s", [100, 10])
def test_a_round_fills_the_links_and_nobody_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mbit_s: int
) -> None:
    links = [Link(mbit_s, queue_ms=250)] * 3
    story = _trains(megabytes=0.05 * mbit_s + 0.5, rounds=2)
    digests, records = _run(tmp_path, monkeypatch, links, story, heartbeat_timeout_ms=5_000)
    _all_went_well(digests, records, rounds=2)


def test_training_goes_on_while_a_fragment_travels_over_a_slow_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = [Link(10, queue_ms=250)] * 2
    story = _trains(megabytes=1, rounds=4, fragments=2, delay=2, should_quantize="int8")
    digests, records = _run(tmp_path, monkeypatch, links, story, heartbeat_timeout_ms=5_000)
    _all_went_well(digests, records, rounds=4)


@pytest.mark.slow
def test_heartbeats_overtake_seconds_of_bulk_where_the_queue_sorts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mark of `process_group/bulk.py` they wait for longer than this timeout."""
    links = [Link(10, queue_ms=4_000, sorts=True)] * 2
    story = _trains(megabytes=20, rounds=3)
    digests, records = _run(
        tmp_path, monkeypatch, links, story, heartbeat_timeout_ms=1_500, deadline_s=200
    )
    _all_went_well(digests, records, rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("mbit_s", [100, 10])
def test_long_averages_through_a_plain_modem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mbit_s: int
) -> None:
    links = [Link(mbit_s, queue_ms=1_000)] * 3
    story = _trains(megabytes=2 * mbit_s if mbit_s < 50 else 100, rounds=4)
    digests, records = _run(
        tmp_path, monkeypatch, links, story, heartbeat_timeout_ms=5_000, deadline_s=280
    )
    _all_went_well(digests, records, rounds=4)
