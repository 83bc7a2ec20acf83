"""Healing through the process group: no further port, and straight into memory that is there.

The header is that of the HTTP transport (`layout.py`), nothing is unpickled. Messages by tag:

    1      length of prefix and header, int64
    2      prefix and header; after a negative length, a text that says why there is no state
    3 + i  bytes of leaf i, unless it has none, in pieces of 4 MiB
    3 + n  checksum over the n leaves

The donor sends while it forms the quorum, to all peers side by side, and is done when all have the
state. With `state_dict` the healing group receives into the tensors that it already has,
wherever one has the same place, dtype and shape, so that healing takes no further memory.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed import Work

from torchft.checkpointing.layout import (
    MAX_HEADER_BYTES,
    PREFIX,
    TRAILER,
    Head,
    LayoutError,
    Leaf,
    blocks_of,
    decode_head,
    decode_prefix,
    encode_head,
)
from torchft.checkpointing.memory import Checksum, SourceLeaf, fresh_memory, tensors_in
from torchft.checkpointing.own_mesh import on_own_mesh
from torchft.checkpointing.snapshot import SLICE_BYTES, Snapshot
from torchft.checkpointing.stream import ProgressDeadline
from torchft.checkpointing.transport import LIMIT, CheckpointTransport
from torchft.checkpointing.tree import decode, encode, same_places
from torchft.errors import DonorRefusedError, HealError, MismatchError, TransferTimeoutError
from torchft.process_group import ProcessGroup

__all__ = ["PGTransport"]

T = TypeVar("T")

_LENGTH, _HEAD, _FIRST_LEAF = 1, 2, 3
_LENGTH_FORMAT = struct.Struct("<q")
_MAX_REASON_BYTES = 4096
_IN_FLIGHT = 8
"""Messages that are under way at a time: each one alone waits for the peer's answer."""


class PGTransport(CheckpointTransport[T]):
    """Sends and receives state dicts over `pg`, which must be configured for the quorum.

    Args:
        pg: a process group with `send` and `recv` for CPU tensors, such as gloo.
        timeout: what is asked for by older scripts. The timeout of each call counts: it bounds each
            wait for a piece of 4 MiB, and not the transfer (`longest_s`).
        device: where received tensors go that have no place in `state_dict`.
        state_dict: gives the tensors to receive into. They are overwritten as the state arrives,
            so when a heal fails they hold parts of both states until the next heal.
    """

    def __init__(
        self,
        pg: ProcessGroup,
        timeout: timedelta,
        device: torch.device,
        state_dict: Callable[[], T] | None = None,
    ) -> None:
        self._pg = pg
        self._device = device
        self._state_dict = state_dict
        self.bytes_sent = 0
        self.bytes_received = 0

    def metadata(self) -> str:
        """`<n/a>`: members of a process group know where their peers are."""
        return "<n/a>"

    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta
    ) -> None:
        """Send `state_dict` to each rank and return when all have it.

        Raises:
            TypeError: a value cannot travel; the message names its place.
            HealError: a peer was lost. The others have been served all the same.
            TransferTimeoutError: a peer did not take it in time.
        """
        tree, sources = encode(state_dict)
        head = encode_head(Head(step, uuid4().hex, tree, tuple(s.leaf for s in sources)))
        self._serve(dst_ranks, _messages(head, sources), f"sending step {step}", timeout)

    def check_state(self, state_dict: T) -> None:
        """See that the state can be encoded; raises TypeError or ValueError with the place."""
        Snapshot.check(state_dict)

    def refuse_checkpoint(
        self, dst_ranks: list[int], step: int, reason: str, timeout: timedelta
    ) -> None:
        """Send `reason` to each rank instead of a state."""
        text = reason.encode()[:_MAX_REASON_BYTES]
        length = _LENGTH_FORMAT.pack(-len(text))
        messages = ((length, _LENGTH), (text, _HEAD))
        self._serve(dst_ranks, messages, f"refusing step {step}", timeout)

    def disallow_checkpoint(self) -> None:
        """Nothing is offered any more once `send_checkpoint` has returned."""

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        """Receive the state of `step` from replica rank `src_rank`.

        Raises:
            MismatchError: a tensor is cut over other ranks here; nothing has been overwritten.
        """
        deadline = self._deadline(timeout)
        own = self._state_dict() if self._state_dict is not None else None
        with _named(f"healing to step {step} from replica rank {src_rank}", deadline):
            head = self._recv_head(src_rank, step, deadline)
            leaves = self._recv_leaves(src_rank, head, _places(head, own), deadline)
            state: Any = on_own_mesh(decode(head.tree, leaves), own)
        return state

    def _deadline(self, timeout: timedelta, share: int = 1) -> ProgressDeadline:
        seconds = timeout.total_seconds()
        return ProgressDeadline(seconds / share, LIMIT * seconds)

    def _serve(
        self, ranks: list[int], messages: Iterable[_Message], what: str, timeout: timedelta
    ) -> None:
        """Send all peers the same, side by side. One that takes nothing may keep the others waiting
        for its share of the timeout; then it is left out."""
        serving = {rank: _Pipeline(self._deadline(timeout, len(ranks))) for rank in ranks}
        failure: Exception | None = None

        def attempt(rank: int, act: Callable[[_Pipeline], None]) -> None:
            nonlocal failure
            pipeline = serving[rank]
            try:
                with _named(f"{what} to replica rank {rank}", pipeline.deadline):
                    act(pipeline)
            except (HealError, TimeoutError) as error:
                failure = failure or error
                del serving[rank]

        for data, tag in messages:
            # Torch has no read-only tensors; byte strings are, and small.
            writable = bytearray(data) if memoryview(data).readonly else data
            message = torch.frombuffer(writable, dtype=torch.uint8)
            for rank in list(serving):
                attempt(rank, partial(self._send, message, rank, tag))
        for rank in list(serving):
            attempt(rank, _Pipeline.finish)
        if failure is not None:
            raise failure

    def _send(self, message: Tensor, rank: int, tag: int, pipeline: _Pipeline) -> None:
        work = self._pg.send([message], rank, tag)
        pipeline.add(work, message.nbytes, lambda: self._count_sent(message))

    def _count_sent(self, message: Tensor) -> None:
        self.bytes_sent += message.nbytes

    def _recv_head(self, rank: int, step: int, deadline: ProgressDeadline) -> Head:
        (nbytes,) = _LENGTH_FORMAT.unpack(self._recv(_LENGTH_FORMAT.size, rank, _LENGTH, deadline))
        if -_MAX_REASON_BYTES <= nbytes < 0:
            reason = self._recv(-nbytes, rank, _HEAD, deadline).decode(errors="replace")
            raise DonorRefusedError(f"the donor refused: {reason}", 500)
        if not PREFIX.size <= nbytes <= PREFIX.size + MAX_HEADER_BYTES:
            raise LayoutError(f"a header of {nbytes} bytes is out of range")
        raw = self._recv(nbytes, rank, _HEAD, deadline)
        if decode_prefix(raw[: PREFIX.size]) != nbytes - PREFIX.size:
            raise LayoutError("the header says another length than the message before it")
        head = decode_head(raw[: PREFIX.size], raw[PREFIX.size :])
        if head.step != step:
            raise DonorRefusedError(f"the donor is serving {head.step} but got step={step}", 400)
        return head

    def _recv(self, nbytes: int, rank: int, tag: int, deadline: ProgressDeadline) -> bytes:
        message = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        _wait(self._pg.recv([message], rank, tag), nbytes, deadline)
        self.bytes_received += nbytes
        return message.numpy().tobytes()

    def _recv_leaves(
        self, rank: int, head: Head, places: dict[int, Tensor], deadline: ProgressDeadline
    ) -> list[Tensor]:
        leaves: dict[int, Tensor] = {}
        checksum = Checksum()
        pipeline = _Pipeline(deadline)

        def arrived(index: int, buffer: Tensor, piece: Tensor, last: bool) -> None:
            checksum.add(piece.numpy().data)
            self.bytes_received += piece.nbytes
            if last:
                checksum.end_block()
                leaves[index] = self._settled(buffer, places.get(index))

        for index, buffer in _buffers(head.leaves, places):
            if not buffer.nbytes:
                leaves[index] = self._settled(buffer, places.get(index))
                continue
            pieces = buffer.reshape(-1).view(torch.uint8).split(SLICE_BYTES)
            for number, piece in enumerate(pieces):
                work = self._pg.recv([piece], rank, _FIRST_LEAF + index)
                last = number == len(pieces) - 1
                pipeline.add(work, piece.nbytes, partial(arrived, index, buffer, piece, last))
        pipeline.finish()
        tag = _FIRST_LEAF + len(head.leaves)
        if TRAILER.unpack(self._recv(TRAILER.size, rank, tag, deadline))[0] != checksum.value:
            raise HealError("the state's checksum does not match: it was damaged or it changed")
        return [leaves[index] for index in range(len(head.leaves))]

    def _settled(self, buffer: Tensor, place: Tensor | None) -> Tensor:
        if place is None:
            return buffer.to(self._device)
        return place if place is buffer else place.copy_(buffer)


_Message = tuple[memoryview | bytes | bytearray, int]
"""What is sent, and its tag."""


def _messages(head: bytes, sources: Sequence[SourceLeaf]) -> Iterator[_Message]:
    """A state, in the order in which it travels; large leaves in pieces under one tag."""
    yield _LENGTH_FORMAT.pack(len(head)), _LENGTH
    yield head, _HEAD
    checksum = Checksum()
    for tag, source in enumerate(sources, _FIRST_LEAF):
        data = source.bytes() if source.leaf.nbytes else b""
        for begin in range(0, len(data), SLICE_BYTES):
            piece = data[begin : begin + SLICE_BYTES]
            checksum.add(memoryview(piece))
            yield piece, tag
        if data:
            checksum.end_block()
    yield TRAILER.pack(checksum.value), _FIRST_LEAF + len(sources)


class _Pipeline:
    """At most so many messages at a time; each is ended, in order, before the deadline."""

    def __init__(self, deadline: ProgressDeadline) -> None:
        self.deadline = deadline
        self._pending: deque[tuple[Work, int, Callable[[], None]]] = deque()

    def add(self, work: Work, nbytes: int, ended: Callable[[], None]) -> None:
        """`ended` is called once `work` is done; until then it keeps the message alive."""
        self.deadline.moved(0)  # only what is waited for has a deadline, not what we do
        self._pending.append((work, nbytes, ended))
        if len(self._pending) >= _IN_FLIGHT:
            self._end_first()

    def finish(self) -> None:
        while self._pending:
            self._end_first()

    def _end_first(self) -> None:
        work, nbytes, ended = self._pending[0]
        _wait(work, nbytes, self.deadline)
        ended()
        self._pending.popleft()


def _wait(work: Work, nbytes: int, deadline: ProgressDeadline) -> None:
    # Gloo counts whole milliseconds: one more, so that its timeout is never before ours.
    work.wait(timedelta(milliseconds=int(deadline.remaining() * 1000) + 1))
    deadline.moved(nbytes)


def _buffers(leaves: tuple[Leaf, ...], places: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """For each leaf in turn the CPU memory to receive into: its place, or else new memory."""
    direct = {index: place for index, place in places.items() if place.device.type == "cpu"}
    blocks = blocks_of(leaves, (i for i in range(len(leaves)) if i not in direct))
    new: dict[int, Tensor] = {}
    for index in range(len(leaves)):
        if index not in direct and index not in new:
            block = next(blocks)
            new.update(tensors_in(fresh_memory(block.nbytes), block, leaves))
        yield index, direct[index] if index in direct else new.pop(index)


def _places(head: Head, own: object) -> dict[int, Tensor]:
    """Tensors of our own state that the donor's leaves fit into, by index of the leaf."""
    if own is None:
        return {}
    template, sources = encode(own)
    places: dict[int, Tensor] = {}
    for index, other in same_places(head.tree, template).items():
        if 0 <= index < len(head.leaves):
            place = _place(sources[other], head.leaves[index])
            if place is not None:
                places[index] = place
    return places


def _place(ours: SourceLeaf, leaf: Leaf) -> Tensor | None:
    """Our own tensor, if the donor's leaf can be received into its memory."""
    tensor = ours.source
    if not isinstance(tensor, Tensor) or ours.leaf != leaf or not tensor.is_contiguous():
        return None
    return None if tensor.is_conj() or tensor.is_neg() else tensor


@contextmanager
def _named(what: str, deadline: ProgressDeadline) -> Iterator[None]:
    """Say in every error what was tried, after its cause. A process group reports time and loss
    alike."""
    try:
        yield
    except (TypeError, MismatchError):
        raise
    except DonorRefusedError as error:
        raise DonorRefusedError(f"{error}, {what}", error.code) from error
    except HealError as error:
        raise HealError(f"{error}, {what}") from error
    except (RuntimeError, TimeoutError) as error:
        try:
            deadline.remaining()
        except TimeoutError as late:
            raise TransferTimeoutError(f"{late}, {what}") from error
        raise HealError(f"{error} (the peer was lost), {what}") from error
