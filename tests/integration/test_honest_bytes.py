"""The bytes that are predicted, counted and recorded are those that pass the network interface.

On a host of its own nothing else passes there. The loopback's packets are so long that headers and
acknowledgements are a few thousandths; a link with shorter ones has more, and they are not ours to
count: `benchmarks/links.py` shows them. Nor is what TCP sends twice, when a reader falls behind: it
passes twice, and the kernel says how often.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.hosts import needs_hosts, on
from world import Group, World

from torchft import settings
from torchft.manager.peers import ManagerPeers
from torchft.network_namespaces import Host, Network
from torchft.ordered import ordered_bytes
from torchft.peers import Place
from torchft.quantization import codec_of, mean_bytes
from torchft.records import read_step_records
from torchft.simulator.peers import bytes_of

GROUPS = 3
NUMBERS = 16_000_001  # 64 MB, and no multiple of anything
ATTEMPTS, MOST_TWICE = 5, 5  # segments that TCP may send twice, of up to 64 KiB each


def passed(folder: Path, run: Callable[[World], list[Any]], groups: int) -> tuple[list[Any], int]:
    """What the groups return, and the bytes that passed their interface, in the first of some
    attempts in which TCP sent hardly anything twice; else in the last one."""
    for attempt in range(ATTEMPTS):
        made = folder / str(attempt)
        made.mkdir()
        with Network() as network:
            before = network.centre.sent().bytes
            world = World(made, min_replicas=groups)
            returned = on(network.centre, lambda world=world: run(world))
            bytes_passed = network.centre.sent().bytes - before
            twice = segments_sent_twice(network.centre)
            print(f"attempt {attempt}: TCP sent {twice} segments twice")
            if twice <= MOST_TWICE:
                break
    return returned, bytes_passed


def segments_sent_twice(host: Host) -> int:
    """By TCP, since the host was made."""
    with host.inside():
        lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, counts = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(counts[names.index("RetransSegs")])


class Way(NamedTuple):
    """One way to average."""

    ordered: bool
    codec: str | None

    def predicted(self) -> int:
        """Bytes that each member sends."""
        if self.codec is not None:
            return mean_bytes(codec_of(self.codec), NUMBERS, GROUPS)
        if self.ordered:
            return ordered_bytes(NUMBERS, 4, GROUPS)
        return bytes_of("average", NUMBERS, 4, GROUPS)


WAYS = {
    "plain": Way(False, None),
    "ordered": Way(True, None),
    "bf16": Way(False, "bf16"),
    "int8": Way(False, "int8"),
}


@needs_hosts
@pytest.mark.parametrize("name", WAYS)
def test_what_is_counted_is_what_passes_the_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    way = WAYS[name]
    steps = tmp_path / "steps.jsonl"
    monkeypatch.setenv(settings.STEP_RECORDS, str(steps))

    def run(world: World) -> list[Any]:
        steps.unlink(missing_ok=True)
        return world.run(*[story] * GROUPS)

    def story(group: Group) -> int:
        manager = group.manager(use_async_quorum=False, min_replica_size=GROUPS, init_sync=False)
        opened = ManagerPeers(manager, deterministic=way.ordered).open(Place.AFTER)
        codec = None if way.codec is None else codec_of(way.codec)
        opened.average([torch.full((1, NUMBERS), 1.0)], codec).wait()
        assert opened.close()
        return group.pg.bytes_sent

    counted, through = passed(tmp_path, run, GROUPS)
    recorded = [record.bytes_sent for record in read_step_records(steps)]
    print(f"{name}: {sum(counted)} counted, {through} passed: {through / sum(counted) - 1:+.2%}")
    assert counted == recorded == [way.predicted()] * GROUPS
    assert sum(counted) >= 64_000_000
    assert abs(through - sum(counted)) <= 0.01 * sum(counted)


@needs_hosts
def test_a_gathering_is_counted_alike(tmp_path: Path) -> None:
    def story(group: Group) -> Any:
        manager = group.manager(use_async_quorum=False, min_replica_size=2, init_sync=False)
        manager.start_quorum()
        _, rows = manager.allgather(torch.zeros(NUMBERS))
        assert manager.should_commit()
        assert len(rows) == 2
        return group.pg.bytes_sent

    counted, through = passed(tmp_path, lambda world: world.run(story, story), 2)
    assert counted == [bytes_of("gather", NUMBERS, 4, 2)] * 2
    assert abs(through - sum(counted)) <= 0.01 * sum(counted)
