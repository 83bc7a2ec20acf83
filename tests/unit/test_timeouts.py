"""The deadlines of a job follow from each other, by one rule."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from torchft.ledger import Ledger
from torchft.manager.plan import Options, WorldSizeMode
from torchft.manager.progress import Progress
from torchft.manager.vote import Closer
from torchft.script import ranks
from torchft.timeouts import inside_group

T = timedelta(seconds=20)


def test_ranks_of_a_group_wait_longer_for_each_other_than_for_other_groups() -> None:
    assert T < inside_group(T) < 2 * T


def test_a_vote_waits_longer_than_a_collective(monkeypatch: Any) -> None:
    waited: list[timedelta] = []
    monkeypatch.setattr("torchft.manager.vote.has_tried_all_donors", lambda *_: False)

    class Client:
        def should_commit(self, *_: Any, timeout: timedelta) -> bool:
            waited.append(timeout)
            return True

    closer = Closer(
        group=SimpleNamespace(client=Client(), rank=0, world_size=2),  # type: ignore[arg-type]
        communicator=SimpleNamespace(finish=lambda *args: waited.append(args[-1])),  # type: ignore[arg-type]
        options=Options(1, True, WorldSizeMode.DYNAMIC, T, T, T, None),
        ledger=Ledger(),
        log=SimpleNamespace(closed=lambda *_, **__: None),  # type: ignore[arg-type]
        progress=Progress(fresh=False),
        load_staged=lambda _: None,
        withdraw=lambda _: None,
        leave=lambda *_: None,
        bytes_offered=lambda: 0,
    )
    transaction: Any = SimpleNamespace(
        failed=False,
        not_finite=False,
        error=None,
        account=SimpleNamespace(bytes_sent=0),
        healed_bytes=0,
        offered_before=0,
    )
    plan: Any = SimpleNamespace(counted=(0, 1), step=0, anyone_heals=False)
    assert closer.close(transaction, plan, None)
    assert waited == [T, inside_group(T)]
    assert closer.close(transaction, plan, timedelta(seconds=3))
    assert waited[2:] == [timedelta(seconds=3)] * 2, "what the caller says is what is done"


def test_the_process_group_of_an_examples_ranks_waits_as_long_as_a_vote(monkeypatch: Any) -> None:
    made: list[timedelta] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("MASTER_PORT", "1")
    fake = SimpleNamespace(
        TCPStore=lambda *_, timeout, **__: made.append(timeout),
        PrefixStore=lambda *_: None,
        init_process_group=lambda *_, timeout, **__: made.append(timeout),
    )
    monkeypatch.setattr(ranks, "distributed", fake)
    ranks.meet_inside(T)
    assert made == [inside_group(T)] * 2
