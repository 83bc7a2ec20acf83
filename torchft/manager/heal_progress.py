"""How the members of a quorum wait for those of them that heal.

A state may take longer to move than any single wait may last. So a rank that heals writes how much
has arrived into the store of its quorum, and then how it ended; the ranks it will communicate with
wait for that before they begin: as long as something moves, within a limit, and not a moment longer
than it takes to fail.

    heal/{step}/{replica rank}      "7340032", bytes so far; "done"; "failed: why"
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch.distributed import Store

from torchft.checkpointing.transport import longest_s
from torchft.errors import CollectiveError
from torchft.retry import pauses

__all__ = ["HealWatch", "Patience", "report_progress", "wait_for_heals"]

_DONE = "done"
_FAILED = "failed: "
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.002, 0.1
_REPORTS_PER_STALL = 8


@dataclass(frozen=True)
class Patience:
    """How long a heal is waited for."""

    stall_s: float
    """Without a further byte."""
    limit_s: float
    """In all, if hardly anything moves (`longest_s`)."""

    @property
    def report_s(self) -> float:
        """How often who heals says how far it is."""
        return self.stall_s / _REPORTS_PER_STALL


class HealWatch:
    """What is known of the heals of one step, without store or clock."""

    def __init__(self, ranks: Sequence[int], now: float, patience: Patience) -> None:
        self.waiting = set(ranks)
        """The replica ranks that have not ended yet."""
        self.failed: dict[int, str] = {}
        """Replica rank → why it could not heal."""
        self.nbytes = dict.fromkeys(ranks, 0)
        """Replica rank → how many bytes of its state have arrived, as far as is known."""
        self._said: dict[int, str] = {}
        self._moved = dict.fromkeys(ranks, now)
        # Who heals gives up first, and says so.
        self._stall_s = patience.stall_s + 3 * patience.report_s
        self._began = now
        self._patience = patience

    def hear(self, rank: int, said: str, now: float) -> None:
        """A rank says how far it is."""
        if said == _DONE or said.startswith(_FAILED):
            self.waiting.discard(rank)
        if said.startswith(_FAILED):
            self.failed[rank] = said.removeprefix(_FAILED)
        if said.isdecimal():
            self.nbytes[rank] = int(said)
        if said != self._said.get(rank):
            self._said[rank], self._moved[rank] = said, now

    def given_up(self, now: float) -> dict[int, str]:
        """Replica rank → why it is waited for no longer."""
        why = {rank: self._why_given_up(rank, now) for rank in list(self.waiting)}
        return {rank: said for rank, said in why.items() if said is not None}

    def _why_given_up(self, rank: int, now: float) -> str | None:
        longest = longest_s(self._patience.limit_s, self.nbytes[rank])
        if now >= self._began + longest + 3 * self._patience.report_s:
            return f"still heals after {longest:g} s"
        if now >= self._moved[rank] + self._stall_s:
            return f"has received nothing of its state for {self._patience.stall_s:g} s"
        return None


def _key(step: int, rank: int) -> str:
    return f"heal/{step}/{rank}"


@contextmanager
def report_progress(
    store: Store, step: int, rank: int, received: Callable[[], int], patience: Patience
) -> Iterator[None]:
    """While this replica rank fetches its state: say how many bytes it has `received`; then, how it
    ended. An exception passes through."""
    key, ended = _key(step, rank), threading.Event()

    def report() -> None:
        said = -1
        try:
            while not ended.wait(patience.report_s):
                if (now := received()) != said:
                    store.set(key, str(said := now))
        except RuntimeError:
            return  # The store is gone, and with it those who read there.

    thread = threading.Thread(target=report, name="torchft-heal-report", daemon=True)
    thread.start()
    last = _DONE
    try:
        yield
    except BaseException as error:
        last = f"{_FAILED}{type(error).__name__}: {error}"
        raise
    finally:
        ended.set()
        thread.join(patience.report_s)
        _say_last(store, key, last)


def _say_last(store: Store, key: str, last: str) -> None:
    """On a thread of its own: a store whose process is stopped answers nothing."""

    def say() -> None:
        try:
            store.set(key, last)
        except RuntimeError:
            return  # As above.

    threading.Thread(target=say, name="torchft-heal-report", daemon=True).start()


def wait_for_heals(
    store: Store,
    step: int,
    members: Sequence[str],
    healing: Sequence[int],
    *,
    participating: Sequence[int],
    is_over: Callable[[], str | None],
    patience: Patience,
) -> int:
    """Wait until the replica ranks `healing` have their state.

    `is_over` says why it is no use to wait any longer, None while it is.

    Returns:
        The bytes of the largest state among them, as far as they were told before its end.

    Raises:
        CollectiveError: one of those `participating` could not heal; or nothing moves any more,
            it takes too long, or `is_over`.
    """
    watch = HealWatch(healing, time.monotonic(), patience)
    if not watch.waiting:
        return 0
    with _listening(store, step, watch) as changed:
        while watch.waiting:
            changed.wait(_LONGEST_LOOK_S)
            given_up = watch.given_up(time.monotonic())
            for rank, why in given_up.items():
                raise CollectiveError(f"{members[rank]} {why}")
            if watch.waiting and (why_over := is_over()) is not None:
                changed.wait(_LONGEST_LOOK_S)  # whoever left may have said why
                if watch.waiting:
                    raise CollectiveError(why_over)
    for rank, why in watch.failed.items():
        if rank in participating:
            raise CollectiveError(f"{members[rank]} could not heal: {why}")
    return max(watch.nbytes.values())


@contextmanager
def _listening(store: Store, step: int, watch: HealWatch) -> Iterator[threading.Event]:
    """Hear what is said in the store, on a thread of its own: it may answer nothing any more."""
    changed, stop = threading.Event(), threading.Event()

    def listen() -> None:
        waits = pauses(_FIRST_LOOK_S, _LONGEST_LOOK_S)
        try:
            while watch.waiting and not stop.is_set():
                for rank in list(watch.waiting):
                    if store.check([_key(step, rank)]):
                        said = store.get(_key(step, rank)).decode()
                        watch.hear(rank, said, time.monotonic())
                if not watch.waiting:
                    changed.set()
                stop.wait(next(waits))
        except RuntimeError:
            return  # The store is gone: nothing is heard any more, which is a stall.

    threading.Thread(target=listen, name="torchft-heal-watch", daemon=True).start()
    try:
        yield changed
    finally:
        stop.set()
