"""The healing side: fetch a state in n parts, check it, and only then believe it.

Memory grows with what has arrived and never beyond it: a block is allocated when its bytes are
next, and its size follows from the checked header. The first failure of any part ends the others.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchft.checkpointing.layout import (
    PREFIX,
    TRAILER,
    Block,
    Head,
    LayoutError,
    blocks_of_part,
    decode_head,
    decode_prefix,
    part_bytes,
)
from torchft.checkpointing.memory import Checksum, fresh_memory, tensors_in
from torchft.checkpointing.snapshot import SLICE_BYTES
from torchft.checkpointing.stream import Deadline, Stream, connect
from torchft.checkpointing.tree import decode
from torchft.errors import DonorRefusedError, HealError

__all__ = ["Address", "Download"]

_MAX_ERROR_BYTES = 4096


@dataclass(frozen=True)
class Address:
    """Host and port at which a donor serves its state."""

    host: str
    port: int
    path: str
    """Ends with a slash."""


@dataclass
class Download:
    """One download of the state of `step`, over `parts` connections at a time."""

    address: Address
    step: int
    parts: int
    deadline: Deadline
    bytes_received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards all below
    _streams: list[Stream] = field(default_factory=list)
    _leaves: dict[int, Tensor] = field(default_factory=dict)
    _failure: BaseException | None = None

    def run(self) -> Any:
        """The state.

        Raises:
            DonorRefusedError: the donor refused.
            HealError: it sent something that is not this state.
            TimeoutError: the deadline passed, which moves on with what arrives.
            OSError: the donor cannot be reached, or the connection broke.
        """
        try:
            head = self._fetch()
        finally:
            for stream in self._streams:
                stream.close()
        return decode(head.tree, [self._leaves[index] for index in range(len(head.leaves))])

    def _fetch(self) -> Head:
        stream, length = self._ask(0)
        raw = _read_raw_head(stream)
        head = decode_head(raw[: PREFIX.size], raw[PREFIX.size :])
        if head.step != self.step:
            raise HealError(f"asked for step {self.step}, the donor sent step {head.step}")
        others = [
            threading.Thread(target=self._fetch_other, args=(part, raw, head), daemon=True)
            for part in range(1, self.parts)
        ]
        for thread in others:
            thread.start()
        try:
            self._read_part(stream, 0, length, raw, head)
            for thread in others:
                thread.join()
        except BaseException as error:  # An interrupt too must end the other parts.
            self._fail(error)
        for thread in others:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return head

    def _fetch_other(self, part: int, raw: bytes, head: Head) -> None:
        try:
            stream, length = self._ask(part)
            if _read_raw_head(stream) != raw:
                raise HealError("the donor's state changed while it was being fetched")
            self._read_part(stream, part, length, raw, head)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error
            for stream in self._streams:
                stream.cut()

    def _ask(self, part: int) -> tuple[Stream, int]:
        """Ask for `part`; the stream stands before its first byte, and so many are to come."""
        stream = connect(self.address.host, self.address.port, self.deadline)
        with self._lock:
            self._streams.append(stream)
            if self._failure is not None:
                stream.cut()
        path = f"{self.address.path}{self.step}/{part}-of-{self.parts}"
        lines = (
            f"GET {path} HTTP/1.1",
            f"Host: {self.address.host}",
            "Connection: close",
        )
        stream.send(["".join(f"{line}\r\n" for line in (*lines, "")).encode()])
        return stream, _accepted_length(stream)

    def _read_part(self, stream: Stream, part: int, length: int, raw: bytes, head: Head) -> None:
        blocks = blocks_of_part(head.leaves, part, self.parts)
        expected = part_bytes(len(raw), blocks)
        if length != expected:
            raise LayoutError(f"the header makes {expected} bytes, the donor announced {length}")
        checksum = Checksum()
        for block in blocks:
            self._read_block(stream, block, head, checksum)
        if TRAILER.unpack(stream.read(TRAILER.size))[0] != checksum.value:
            raise HealError("the state's checksum does not match: it was damaged or it changed")
        with self._lock:
            self.bytes_received += length

    def _read_block(self, stream: Stream, block: Block, head: Head, checksum: Checksum) -> None:
        memory = fresh_memory(block.nbytes)
        for begin in range(0, block.nbytes, SLICE_BYTES):
            piece = memory[begin : begin + SLICE_BYTES]
            stream.read_into(piece)
            checksum.add(piece)
        checksum.end_block()
        leaves = dict(tensors_in(memory, block, head.leaves))
        with self._lock:
            self._leaves.update(leaves)


def _read_raw_head(stream: Stream) -> bytes:
    prefix = stream.read(PREFIX.size)
    return prefix + stream.read(decode_prefix(prefix))


def _accepted_length(stream: Stream) -> int:
    """Content-Length of a 200. Raises DonorRefusedError with the donor's words for another."""
    try:
        first, *rest = stream.read_head().split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(":") for x in rest)}
        status, length = int(first.split(" ")[1]), int(headers["content-length"])
    except (ValueError, LookupError):
        raise LayoutError("the donor's answer is no HTTP") from None
    if status == 200:
        return length
    text = stream.read(max(0, min(length, _MAX_ERROR_BYTES))).decode(errors="replace")
    raise DonorRefusedError(f"the donor refused ({status}): {text}", status)
