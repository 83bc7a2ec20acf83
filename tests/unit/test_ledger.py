"""Every moment is in one bucket, and the buckets add up."""

from __future__ import annotations

import threading
import time

import pytest
from helpers.clock import Clock

from torchft.errors import SettingsError
from torchft.ledger import Bucket, Ledger, process_age_s, spent_between


@pytest.fixture
def clock() -> Clock:
    return Clock()


def spent(ledger: Ledger) -> dict[str, float]:
    return {bucket: seconds for bucket, seconds in ledger.snapshot().items() if seconds}


def test_time_outside_every_bucket_is_other(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=0.0)
    clock.now += 2
    assert spent(ledger) == {"other": 2.0}


def test_start_is_the_age_of_the_process_at_birth(clock: Clock) -> None:
    assert spent(Ledger(clock=clock, age_s=3.5)) == {"start": 3.5}


def test_an_inner_bucket_suspends_the_outer_one(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=0.0)
    with ledger.spending("compute"):
        clock.now += 1
        with ledger.spending(Bucket.COMMUNICATE):
            clock.now += 4
        clock.now += 2
    clock.now += 8
    assert spent(ledger) == {"compute": 3.0, "communicate": 4.0, "other": 8.0}


def test_a_bucket_inside_itself_counts_once(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=0.0)
    with ledger.spending("heal"), ledger.spending("heal"):
        clock.now += 1
    assert spent(ledger) == {"heal": 1.0}


def test_an_exception_closes_its_buckets(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=0.0)
    with pytest.raises(RuntimeError), ledger.spending("vote"), ledger.spending("quorum"):
        clock.now += 1
        raise RuntimeError
    clock.now += 1
    assert spent(ledger) == {"quorum": 1.0, "other": 1.0}


def test_a_snapshot_inside_a_bucket_counts_it_until_now(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=0.0)
    with ledger.spending("data"):
        clock.now += 1
        assert spent(ledger) == {"data": 1.0}
        clock.now += 1
    assert spent(ledger) == {"data": 2.0}


def test_another_thread_spends_nothing(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=0.0)

    def elsewhere() -> None:
        with ledger.spending("heal"):
            clock.now += 1

    thread = threading.Thread(target=elsewhere)
    with ledger.spending("compute"):
        thread.start()
        thread.join()
    assert spent(ledger) == {"compute": 1.0}


def test_an_unknown_bucket_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(SettingsError, match=r"no bucket 'coffee'.*quorum"):
        Ledger().spending("coffee")


def test_buckets_add_up_to_the_age_of_the_process() -> None:
    ledger = Ledger()
    with ledger.spending("compute"):
        sum(range(1000))
    # Process ages come in ticks of 10 ms.
    assert sum(ledger.snapshot().values()) == pytest.approx(process_age_s(), abs=0.1)


def test_difference_of_two_snapshots_is_one_step(clock: Clock) -> None:
    ledger = Ledger(clock=clock, age_s=9.0)
    before = ledger.snapshot()
    with ledger.spending("vote"):
        clock.now += 1
    assert spent_between(before, ledger.snapshot()) == {"vote": 1.0}


def test_a_switch_is_cheap() -> None:
    ledger = Ledger()

    def thousand_uses_s() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            with ledger.spending("compute"):
                pass
        return time.perf_counter() - began

    # About 0.5 µs a use on a quiet machine; the bound only catches a different order of magnitude.
    assert min(thousand_uses_s() for _ in range(20)) < 1000 * 10e-6
