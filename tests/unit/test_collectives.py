"""The ordered all-reduce step by step: what is written when, and to whom its second half goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import Work

from torchft.collectives import OrderedMean, QuantizedMean, as_bytes
from torchft.errors import CollectiveError, PhaseError


class Step(Work):
    """A half that ends when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.ended:
            raise RuntimeError("not yet")
        return True


@dataclass
class Group:
    """Two members, of which this one does all the talking; the other one's chunk is ones."""

    generation: object = 1
    broken: bool = False
    chunks: Step = field(default_factory=Step)
    means: Step = field(default_factory=Step)
    gathers: int = 0

    def size(self) -> int:
        return 2

    def alltoall_base(self, output: Tensor, mine: Tensor, *_: object) -> Work:
        output.copy_(mine)
        return self.chunks

    def allgather(self, output: list[list[Tensor]], mine: list[Tensor], _: object) -> Work:
        self.gathers += 1
        if self.broken:
            raise CollectiveError("no connection")
        for row in output[0]:
            row.copy_(mine[0])
        return self.means


def test_the_tensor_is_written_when_all_is_there() -> None:
    group, tensor = Group(), torch.tensor([2.0, 3.0, 4.0])
    work = OrderedMean(group, tensor, [0, 1])  # type: ignore[arg-type]
    group.chunks.ended = True
    with pytest.raises(RuntimeError, match="not yet"):
        work.wait(timedelta(milliseconds=1))
    assert tensor.tolist() == [2.0, 3.0, 4.0] and not work.is_completed()
    group.means.ended = True
    assert work.wait() and work.wait() and work.is_completed()
    assert tensor.tolist() == [3.0, 1.5, 3.0]
    assert group.gathers == 1


def test_a_second_half_that_cannot_begin_is_not_begun_twice() -> None:
    group = Group(broken=True)
    group.chunks.ended = True
    work = OrderedMean(group, torch.ones(3), [0, 1])  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(CollectiveError, match="no connection"):
            work.wait()
    assert group.gathers == 1


def test_the_second_half_goes_to_the_members_of_the_first_whoever_is_there_by_then() -> None:
    members, others = Group(), Group()
    members.chunks.ended = members.means.ended = True
    group = Group(generation=members, chunks=members.chunks)
    work = OrderedMean(group, torch.ones(3), [0, 1])  # type: ignore[arg-type]
    group.generation = others
    work.wait()
    assert (members.gathers, others.gathers, group.gathers) == (1, 0, 0)


def test_the_second_half_is_refused_when_its_members_were_given_up() -> None:
    class GivenUp:
        def allgather(self, *_: object) -> Work:
            raise CollectiveError("abandoned")

    group = Group(generation=GivenUp())
    group.chunks.ended = True
    work = OrderedMean(group, torch.ones(3), [0, 1])  # type: ignore[arg-type]
    group.generation = Group()
    with pytest.raises(CollectiveError, match="abandoned"):
        work.wait()
    assert group.gathers == 0


def test_it_has_no_future() -> None:
    with pytest.raises(PhaseError, match="who waits"):
        OrderedMean(Group(), torch.ones(3), [0, 1]).get_future()  # type: ignore[arg-type]


def test_what_travels_is_what_the_codec_makes() -> None:
    group, tensor = Group(), torch.tensor([1.0, 1.001, 3.0, 4.0])
    group.chunks.ended = group.means.ended = True
    work = QuantizedMean(group, tensor, [0, 1], "bf16")  # type: ignore[arg-type]
    assert work._sent.nbytes == 8
    work.wait()
    assert tensor.tolist() == [2.0, 2.5, 2.0, 2.5]


# ---------------------------------------------------------------------- gathering


def test_bytes_of_a_tensor_share_its_storage() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    as_bytes(tensor)[0] = 7
    assert tensor[0, 0] == 7
    assert as_bytes(tensor.T).tolist() == [7, 0, 3, 0, 2, 0, 4, 0]
    assert as_bytes(torch.tensor(True)).tolist() == [1]
