"""The ordered all-reduce: among real processes, and what is left of it when one of them dies."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import Work

from tests.helpers.ranks import Rank, ranks
from torchft.collectives import OrderedMean, QuantizedMean, as_bytes
from torchft.errors import CollectiveError, PhaseError
from torchft.ledger import Ledger
from torchft.manager.average import Average
from torchft.manager.transaction import Transaction
from torchft.ordered import ordered_bytes, ordered_mean

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 7, 12, 13, 1009)


def _row(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of every magnitude, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(1000 * size + rank)
    exponents = torch.randint(-6, 7, (size,), generator=generator)
    return (torch.randn(size, generator=generator) * 2.0**exponents).to(dtype)


def _rows(members: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([_row(rank, size, dtype) for rank in range(members)])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))


# ---------------------------------------------------------------------- between processes


def _average_everything(rank: Rank) -> None:
    group, members = rank.configure(), rank.world_size
    cases = [(size, dtype) for dtype in DTYPES for size in SIZES]
    before = group.bytes_sent
    tensors = [_row(rank.rank, size, dtype) for size, dtype in cases]
    works = [OrderedMean(group, tensor, range(members)) for tensor in tensors]  # all in flight
    for (size, dtype), tensor, work in zip(cases, tensors, works, strict=True):
        assert work.wait(timedelta(seconds=20)) and work.is_completed()
        assert _same_bits(tensor, ordered_mean(_rows(members, size, dtype))[0]), (size, dtype)
    expected = sum(ordered_bytes(size, dtype.itemsize, members) for size, dtype in cases)
    assert group.bytes_sent - before == expected
    rank.tell("equal")


@pytest.mark.parametrize("members", [2, 3, 5, 12])
def test_every_member_has_the_bits_of_the_ordered_mean(members: int) -> None:
    with ranks(members, _average_everything) as world:
        assert world.hear_all() == ["equal"] * members


def _average_a_matrix_without_rank_1(rank: Rank) -> None:
    group = rank.configure()
    # Minus zero at the counted members: zeros added for the others would lose its sign.
    mine = torch.full((3, 5), float("nan") if rank.rank == 1 else -0.0)
    tensor = mine.clone().T  # not contiguous
    OrderedMean(group, tensor, [0, 2]).wait()
    assert torch.equal(tensor, torch.zeros(5, 3)) and torch.signbit(tensor).all()
    nobody = torch.ones(4)
    OrderedMean(group, nobody, []).wait()
    assert nobody.tolist() == [0.0] * 4
    rank.tell("equal")


def test_a_member_that_is_not_counted_takes_part_and_leaves_no_trace() -> None:
    with ranks(3, _average_a_matrix_without_rank_1) as world:
        assert world.hear_all() == ["equal"] * 3


def _die_between_the_halves(rank: Rank) -> None:
    group = rank.configure()
    transaction = Transaction(Ledger(), on_error=lambda _: group.abort())
    tensor = torch.ones(7)
    works = [OrderedMean(group, tensor, range(3)), OrderedMean(group, torch.ones(2), range(3))]
    averages = [Average(transaction, w, tensor, 1, group.generation) for w in works]
    for work in works:
        work._chunks.wait()  # the first half of both is done everywhere
    rank.tell("half")
    rank.listen()
    for average in averages:
        average.wait(timedelta(seconds=20))
    rank.tell((str(transaction.error), tensor.tolist()))


def test_a_member_that_dies_between_the_halves_frees_the_others() -> None:
    with ranks(3, _die_between_the_halves) as world:
        world.hear_all()
        world.kill(1)
        world.tell("go on", 0, 2)
        for error, tensor in world.hear_all(0, 2):
            assert "the all-reduce of (7,) failed" in error
            assert tensor == [1.0] * 7


def _wait_for_the_silent(rank: Rank) -> None:
    group = rank.configure()
    rank.tell("there")
    rank.listen()
    tensor = torch.full((5,), float(rank.rank))
    work = OrderedMean(group, tensor, range(3))
    if rank.rank == 0:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                work.wait(timedelta(milliseconds=20))
        rank.tell("waited in vain")
    work.wait(timedelta(seconds=20))
    rank.tell(tensor.tolist())


def test_a_wait_that_was_too_short_is_taken_up_again() -> None:
    with ranks(3, _wait_for_the_silent) as world:
        world.hear_all()
        world.tell("go on", 0, 1)
        assert world.hear(0) == "waited in vain"
        world.tell("go on", 2)
        assert world.hear_all() == [[1.0] * 5] * 3


# ---------------------------------------------------------------------- step by step


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
