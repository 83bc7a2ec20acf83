"""A state is read only while its window is open, and closing it never takes for ever."""

from __future__ import annotations

import threading

import pytest

from torchft.checkpointing.window import Refused, Window


def no_cut() -> None:
    raise AssertionError("nobody should be cut")


@pytest.fixture
def window() -> Window[str]:
    return Window()


def test_a_reader_gets_what_is_offered(window: Window[str]) -> None:
    window.open(3, "state")
    with window.lease(3, timeout_s=0, cut=no_cut) as offer:
        assert offer == "state"
    assert window.close(timeout_s=0) == 0


@pytest.mark.parametrize(("asked", "timeout_s"), [(2, 30), (4, 0)])
def test_another_step_is_refused_and_both_are_named(
    window: Window[str], asked: int, timeout_s: float
) -> None:
    window.open(3, "state")
    with (
        pytest.raises(Refused, match=f"serving 3 but got step={asked}"),
        window.lease(asked, timeout_s=timeout_s, cut=no_cut),
    ):
        pass


def test_who_asks_for_the_next_step_while_an_older_one_is_offered_waits_for_it(
    window: Window[str],
) -> None:
    """The donor has that one still open: it was offered, and nobody took it."""
    got: list[str] = []

    def read() -> None:
        with window.lease(4, timeout_s=30, cut=no_cut) as offer:
            got.append(offer)

    window.open(3, "old")
    reader = threading.Thread(target=read)
    reader.start()
    window.close(timeout_s=0)
    window.open(4, "new")
    reader.join(30)
    assert got == ["new"]


def test_a_reader_that_comes_early_waits_for_the_window(window: Window[str]) -> None:
    got: list[str] = []

    def read() -> None:
        with window.lease(3, timeout_s=30, cut=no_cut) as offer:
            got.append(offer)

    reader = threading.Thread(target=read)
    reader.start()
    window.open(3, "state")
    reader.join(30)
    assert got == ["state"]


def test_a_window_that_stays_closed_refuses_at_the_deadline(window: Window[str]) -> None:
    with (
        pytest.raises(Refused, match="no state within 0 s"),
        window.lease(3, timeout_s=0, cut=no_cut),
    ):
        pass


def test_a_closed_window_lets_nobody_in_and_keeps_nothing(window: Window[str]) -> None:
    window.open(3, "state")
    window.close(timeout_s=0)
    assert not window.relabel(3)
    with pytest.raises(Refused), window.lease(3, timeout_s=0, cut=no_cut):
        pass


def test_close_waits_for_the_reader_inside(window: Window[str]) -> None:
    window.open(3, "state")
    inside, finish = threading.Event(), threading.Event()

    def read() -> None:
        with window.lease(3, timeout_s=0, cut=no_cut):
            inside.set()
            finish.wait(30)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(30)
    threading.Thread(target=finish.set).start()
    assert window.close(timeout_s=30) == 0
    reader.join(30)


def test_close_cuts_the_reader_that_is_too_slow(window: Window[str]) -> None:
    window.open(3, "state")
    inside, cut = threading.Event(), threading.Event()

    def read() -> None:
        with window.lease(3, timeout_s=0, cut=cut.set):
            inside.set()
            cut.wait(30)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(30)
    assert window.close(timeout_s=0) == 1
    reader.join(30)
    assert cut.is_set()


def test_a_shut_window_refuses_those_who_wait(window: Window[str]) -> None:
    refused = threading.Event()

    def read() -> None:
        try:
            with window.lease(3, timeout_s=30, cut=no_cut):
                pass
        except Refused:
            refused.set()

    reader = threading.Thread(target=read)
    reader.start()
    window.shut()
    assert refused.wait(30)
    reader.join(30)
