"""How long the others wait for a member that heals: while something moves, and no longer."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
from torch.distributed import HashStore

from torchft.checkpointing.transport import SLOWEST
from torchft.errors import CollectiveError
from torchft.manager.heal_progress import HealWatch, Patience, report_progress, wait_for_heals

PATIENCE = Patience(stall_s=8.0, limit_s=80.0)
SHORT = Patience(stall_s=0.08, limit_s=10.0)
MEMBERS = ("a", "b", "c")


def watch(*ranks: int) -> HealWatch:
    return HealWatch(ranks, now=0.0, patience=PATIENCE)


def test_a_heal_that_moves_is_waited_for_longer_than_any_average() -> None:
    heals = watch(1)
    for now in range(0, 71, 7):
        heals.hear(1, str(now), float(now))
        assert not heals.given_up(now + 6.9)
    assert heals.waiting == {1}
    heals.hear(1, "done", 78.0)
    assert not heals.waiting and not heals.failed


def test_a_heal_that_stands_still_is_given_up_after_who_heals_has_said_so() -> None:
    heals = watch(1, 2)
    heals.hear(1, "100", 1.0)
    heals.hear(2, "100", 1.0)
    heals.hear(1, "200", 8.0)
    heals.hear(2, "100", 8.0)
    assert not heals.given_up(9.0)
    assert heals.given_up(12.1) == {2: "has received nothing of its state for 8 s"}


def test_a_heal_that_never_ends_is_given_up_at_the_limit() -> None:
    heals = watch(1)
    heals.hear(1, "1", 82.9)
    assert heals.given_up(83.1) == {1: "still heals after 80 s"}


def test_a_large_state_over_a_slow_link_is_waited_for_beyond_the_limit() -> None:
    heals = watch(1)
    for now in range(0, 1000, 5):
        heals.hear(1, str(now * SLOWEST), float(now))
        assert not heals.given_up(now + 4.9)
    assert heals.nbytes == {1: 995 * SLOWEST}


def test_a_heal_that_failed_says_why() -> None:
    heals = watch(1)
    heals.hear(1, "failed: HealError: the donor refused", 1.0)
    assert heals.failed == {1: "HealError: the donor refused"}
    assert not heals.waiting


# ---------------------------------------------------------------- over a store


def waits(store: Any, healing: list[int], **options: Any) -> None:
    arguments: dict[str, Any] = {
        "participating": [0, 1, 2],
        "is_over": lambda: None,
        "patience": SHORT,
        **options,
    }
    wait_for_heals(store, 5, MEMBERS, healing, **arguments)


def test_whoever_waits_goes_on_when_all_have_healed() -> None:
    store = HashStore()
    received, long_enough = itertools.count(), threading.Event()

    def moves() -> int:
        nbytes = next(received)
        if nbytes == 20:  # a report each 10 ms: more than the 80 ms that one byte may take
            long_enough.set()
        return nbytes

    def heals() -> None:
        with report_progress(store, 5, 1, moves, SHORT):
            assert long_enough.wait(10)

    thread = threading.Thread(target=heals)
    thread.start()
    waiting = threading.Thread(target=waits, args=(store, [1]))
    waiting.start()
    assert long_enough.wait(10)
    waiting.join(10)
    thread.join(10)
    assert store.get("heal/5/1") == b"done" and not waiting.is_alive()


def test_a_failed_heal_of_a_counted_group_fails_the_step_of_the_others_at_once() -> None:
    store = HashStore()
    with pytest.raises(OSError, match="gone"), report_progress(store, 5, 1, lambda: 0, SHORT):
        raise OSError("the donor is gone")
    with pytest.raises(CollectiveError, match="b could not heal: OSError: the donor is gone"):
        waits(store, [1])


def test_a_failed_heal_of_a_group_that_sends_zeros_does_not_touch_the_others() -> None:
    store = HashStore()
    with pytest.raises(OSError, match="gone"), report_progress(store, 5, 1, lambda: 0, SHORT):
        raise OSError("the donor is gone")
    waits(store, [1], participating=[0, 2])


def test_a_member_that_dies_while_it_heals_is_not_waited_for() -> None:
    patience = Patience(stall_s=60.0, limit_s=600.0)
    with pytest.raises(CollectiveError, match="a member left"):
        waits(HashStore(), [1], patience=patience, is_over=lambda: "a member left")


def test_a_healing_group_that_says_nothing_is_named() -> None:
    with pytest.raises(CollectiveError, match=r"c has received nothing of its state for 0\.08 s"):
        waits(HashStore(), [2])
