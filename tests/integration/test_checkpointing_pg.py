"""Healing through a process group: two gloo ranks in two threads of one process."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from torchft.checkpointing import pg_transport
from torchft.checkpointing.layout import PREFIX, Head, Leaf, encode_head
from torchft.checkpointing.pg_transport import PGTransport
from torchft.checkpointing.tree import encode, same_places
from torchft.errors import HealError, TransferTimeoutError
from torchft.process_group import ProcessGroupGloo

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=100)
CPU = torch.device("cpu")

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def groups(store: TCPStore) -> Iterator[list[ProcessGroupGloo]]:
    address = f"localhost:{store.port}/pg_transport/{next(_prefixes)}"
    made = [ProcessGroupGloo(LONG) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(g.configure, address, f"r{i}", i, 2) for i, g in enumerate(made)]
        for rank in ranks:
            rank.result(30)
    yield made
    for group in made:
        group.shutdown()


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def heal(
    groups: list[ProcessGroupGloo], sent: Any, into: Any = None, step: int = 3
) -> tuple[Any, PGTransport[Any], PGTransport[Any]]:
    donor: PGTransport[Any] = PGTransport(groups[0], LONG, CPU)
    template = None if into is None else lambda: into
    healing: PGTransport[Any] = PGTransport(groups[1], LONG, CPU, template)
    sending = in_thread(lambda: donor.send_checkpoint([1], 3, sent, LONG))
    got = healing.recv_checkpoint(0, donor.metadata(), step, LONG)
    sending.result(30)
    return got, donor, healing


def state(fill: float) -> dict[str, Any]:
    return {
        "w": torch.full((40, 3), fill),
        "t": torch.full((3, 4), fill).T,
        "empty": torch.empty(0),
        "step": torch.tensor(fill, dtype=torch.bfloat16),
        "raw": b"bytes",
        "lr": fill,
    }


def assert_same(got: dict[str, Any], sent: dict[str, Any]) -> None:
    assert list(got) == list(sent)
    for key, value in sent.items():
        same = (
            torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value
        )
        assert same, key


def test_a_state_arrives_whole(groups: list[ProcessGroupGloo]) -> None:
    got, donor, healing = heal(groups, state(2.0))
    assert_same(got, state(2.0))
    assert donor.bytes_sent == healing.bytes_received > 480


def test_many_leaves_arrive_in_order(groups: list[ProcessGroupGloo]) -> None:
    got, _, _ = heal(groups, [torch.full((i % 5,), i) for i in range(100)])
    assert [t.tolist() for t in got] == [[i] * (i % 5) for i in range(100)]


def test_it_is_received_into_tensors_that_are_there(groups: list[ProcessGroupGloo]) -> None:
    own = state(0.0)
    got, _, _ = heal(groups, state(2.0), into=own)
    assert_same(got, state(2.0))
    assert got["w"].data_ptr() == own["w"].data_ptr()
    assert bool((own["w"] == 2).all())


def test_what_does_not_fit_is_received_into_new_memory(groups: list[ProcessGroupGloo]) -> None:
    own: dict[str, Any] = {
        "w": torch.zeros(5),
        "step": torch.zeros((), dtype=torch.float32),
        "t": 1,
    }
    got, _, _ = heal(groups, state(2.0), into=own)
    assert_same(got, state(2.0))
    assert own["w"].tolist() == [0] * 5


def test_another_step_names_both(groups: list[ProcessGroupGloo]) -> None:
    with pytest.raises(HealError, match=r"serving 3 but got step=4, .*step 4 from replica rank 0"):
        heal(groups, {}, step=4)


def test_a_silent_donor_ends_at_the_deadline_of_the_call(groups: list[ProcessGroupGloo]) -> None:
    healing: PGTransport[Any] = PGTransport(groups[1], LONG, CPU)
    with pytest.raises(TransferTimeoutError, match=r"no byte within 0\.1 s"):
        healing.recv_checkpoint(0, "<n/a>", 3, SHORT)


def test_the_timeout_of_the_call_wins_where_it_is_longer(groups: list[ProcessGroupGloo]) -> None:
    donor: PGTransport[Any] = PGTransport(groups[0], SHORT, CPU)
    healing: PGTransport[Any] = PGTransport(groups[1], SHORT, CPU)
    waiting = in_thread(lambda: healing.recv_checkpoint(0, "<n/a>", 3, LONG))
    with pytest.raises(TimeoutError):  # five times what the constructors were given
        waiting.result(5 * SHORT.total_seconds())
    donor.send_checkpoint([1], 3, {"w": 1}, LONG)
    assert waiting.result(30) == {"w": 1}


def test_a_lost_peer_is_named_and_the_others_are_served(groups: list[ProcessGroupGloo]) -> None:
    donor: PGTransport[Any] = PGTransport(groups[0], LONG, CPU)
    groups[1].shutdown()
    with pytest.raises(HealError, match=r"lost.*sending step 3 to replica rank 1"):
        donor.send_checkpoint([1], 3, state(1.0), LONG)


def test_a_state_that_cannot_travel_is_named_before_anything_is_sent() -> None:
    donor: PGTransport[Any] = PGTransport(ProcessGroupGloo(LONG), LONG, CPU)
    with pytest.raises(TypeError, match=r"\['f'\]"):
        donor.send_checkpoint([1], 3, {"f": object()}, LONG)


HEAD = encode_head(Head(3, "w", ["list", ["tensor", 0]], (Leaf("uint8", (4,)),)))


@pytest.mark.parametrize(
    ("length", "head", "why"),
    [
        (-5000, b"", "header of -5000 bytes"),
        (1 << 62, b"", "out of range"),
        (PREFIX.size + 4, b"\x80\x04 a pickle".ljust(PREFIX.size + 4), "no torchft state"),
        (len(HEAD), HEAD[:-1] + b"?", "checksum"),
        (len(HEAD) + 1, HEAD + b"?", "another length"),
    ],
)
def test_garbage_is_a_heal_error(
    groups: list[ProcessGroupGloo], length: int, head: bytes, why: str
) -> None:
    def send() -> None:
        groups[0].send([torch.tensor([length]).view(torch.uint8)], 1, 1).wait()
        if head:
            message = torch.frombuffer(bytearray(head), dtype=torch.uint8)
            groups[0].send([message], 1, 2).wait()

    sending = in_thread(send)
    healing: PGTransport[Any] = PGTransport(groups[1], LONG, CPU)
    with pytest.raises(HealError, match=why):
        healing.recv_checkpoint(0, "<n/a>", 3, LONG)
    sending.result(30)


def test_a_damaged_leaf_is_noticed(groups: list[ProcessGroupGloo]) -> None:
    messages = [
        torch.tensor([len(HEAD)]).view(torch.uint8),
        torch.frombuffer(bytearray(HEAD), dtype=torch.uint8),
        torch.arange(4, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8),
    ]

    def send() -> None:
        for tag, message in enumerate(messages, start=1):
            groups[0].send([message], 1, tag).wait()

    sending = in_thread(send)
    healing: PGTransport[Any] = PGTransport(groups[1], LONG, CPU)
    with pytest.raises(HealError, match="checksum"):
        healing.recv_checkpoint(0, "<n/a>", 3, LONG)
    sending.result(30)


def test_places_are_matched_by_key_and_position() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    theirs, _ = encode({"x": [a, b], "new": c, 3: a})
    ours, _ = encode(OrderedDict({3: c, "x": [b, a, c]}))
    # Leaves in order: theirs a, b, c; ours c, b, a. `a` is at x[0] there, where we hold b.
    assert same_places(theirs, ours) == {0: 1, 1: 2}


def test_a_donor_without_a_state_says_why_and_the_next_heal_works(
    groups: list[ProcessGroupGloo],
) -> None:
    donor: PGTransport[Any] = PGTransport(groups[0], LONG, CPU)
    healing: PGTransport[Any] = PGTransport(groups[1], LONG, CPU)
    refusing = in_thread(lambda: donor.refuse_checkpoint([1], 3, "KeyError: 'ema'", LONG))
    with pytest.raises(HealError, match=r"^the donor refused: KeyError: 'ema', healing to step 3"):
        healing.recv_checkpoint(0, donor.metadata(), 3, LONG)
    refusing.result(30)
    assert heal(groups, {"w": 1})[0] == {"w": 1}


class Throttled:
    """A process group that hands each message over a moment later."""

    def __init__(self, group: ProcessGroupGloo, pause_s: float) -> None:
        self._group = group
        self._pause_s = pause_s

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Any:
        threading.Event().wait(self._pause_s)
        return self._group.send(tensors, rank, tag)


def test_a_transfer_that_moves_may_take_longer_than_its_timeout(
    groups: list[ProcessGroupGloo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg_transport, "SLICE_BYTES", 64)
    timeout, sent = timedelta(seconds=0.3), {"w": torch.arange(160.0)}
    slow: Any = Throttled(groups[0], pause_s=0.06)  # ten pieces, and four other messages
    donor: PGTransport[Any] = PGTransport(slow, timeout, CPU)
    healing: PGTransport[Any] = PGTransport(groups[1], timeout, CPU)
    sending = in_thread(lambda: donor.send_checkpoint([1], 3, sent, timeout))
    began = time.monotonic()
    got = healing.recv_checkpoint(0, donor.metadata(), 3, timeout)
    assert time.monotonic() - began > timeout.total_seconds()
    sending.result(30)
    assert torch.equal(got["w"], sent["w"])
    assert healing.bytes_received > 640


def test_a_peer_that_takes_nothing_does_not_keep_the_state_from_the_next(store: TCPStore) -> None:
    address = f"localhost:{store.port}/pg_transport/{next(_prefixes)}"
    groups = [ProcessGroupGloo(LONG) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: groups[i].configure(address, f"r{i}", i, 3), range(3)))
    second = timedelta(seconds=1)
    donor: PGTransport[Any] = PGTransport(groups[0], second, CPU)
    healing: PGTransport[Any] = PGTransport(groups[2], second, CPU)
    sending = in_thread(lambda: donor.send_checkpoint([1, 2], 3, {"w": list(range(5))}, second))
    assert healing.recv_checkpoint(0, donor.metadata(), 3, second) == {"w": list(range(5))}
    with pytest.raises((HealError, TimeoutError), match="to replica rank 1"):
        sending.result(30)
    for group in groups:
        group.shutdown()
