"""The shared weights: what a round makes of them, and what workers are told."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchft.ordered import ordered_mean
from torchft.parameter_server.core import chunks as module
from torchft.parameter_server.core.delayed_nesterov import DelayedNesterov
from torchft.parameter_server.core.events import RoundClosed
from torchft.parameter_server.core.refused import Refused, Unfit
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.submission import Share, Submission
from torchft.parameter_server.core.weight_update import UpdateKind, WeightUpdate
from torchft.parameter_server.server.upload import Upload, norm_limit
from torchft.parameter_server.server.weights import ServerWeights
from torchft.quantization import codec_of
from torchft.strategies.parts.outer import FlatOuter

N = 1300
SGD = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 512)


def row(seed: int) -> Tensor:
    return torch.randn(1, N, generator=torch.Generator().manual_seed(seed))


class World:
    """A server's state with one fragment, and uploads on disk."""

    def __init__(
        self, folder: Path, codec: str = "fp32", outer: FlatOuter | DelayedNesterov | None = None
    ) -> None:
        self.folder = folder
        shape = ModelShape.of([("w", torch.empty(N))])
        self.state = ServerWeights(
            shape, codec_of(codec), outer or FlatOuter(SGD), [row(0)], folder / "news"
        )
        self.base = row(0)
        self.at = self.state.published(0)

    def round(self, deltas: Sequence[Tensor], weights: Sequence[float] | None = None) -> None:
        chunks = self.state.chunks(0)
        terms = []
        for index, delta in enumerate(deltas):
            data = [chunks.encode(i, delta[:, chunks.span(i)]) for i in range(chunks.count)]
            (self.folder / str(index)).write_bytes(b"".join(data))
            one = Submission(f"w{index}", "1", 0, 0, 1, 1, 1, str(index))
            terms.append(Share(one, weights[index] if weights else 1.0, 0))
        version = self.state.published(0).version + 1
        self.state.apply(RoundClosed(0, version, tuple(terms)), lambda name: self.folder / name)

    def follow(self) -> WeightUpdate:
        """As a worker does."""
        news = self.state.update_for(0, self.at.version, self.at.identity)
        codec = codec_of("fp32") if news.kind is UpdateKind.FULL else None
        chunks = self.state.chunks(0, codec)
        for name in news.files:
            for index, piece in enumerate(chunks.read(self.folder / "news" / name)):
                part = self.base[:, chunks.span(index)]
                numbers = chunks.decode(index, piece, torch.empty_like(part))
                part.copy_(numbers) if news.kind is UpdateKind.FULL else part.add_(numbers)
        assert module.identity_of(self.base) == news.identity
        self.at = self.state.published(0)
        return news


def reference(rounds: Sequence[Sequence[Tensor]]) -> Tensor:
    """The outer step of the strategies, over the ordered mean."""
    weights = torch.nn.Parameter(row(0))
    optimizer = SGD([weights])
    for deltas in rounds:
        weights.grad = ordered_mean(torch.cat(list(deltas)))
        optimizer.step()
    return weights.detach()


def test_a_round_has_the_bits_of_the_strategies_outer_step(tmp_path: Path) -> None:
    world = World(tmp_path)
    rounds = [[row(10 * r + i) * 0.1 for i in range(3)] for r in range(3)]
    for deltas in rounds:
        world.round(deltas)
        assert world.follow().kind is UpdateKind.FULL
    assert torch.equal(world.base, reference(rounds))


def test_weights_of_the_mean(tmp_path: Path) -> None:
    outer = FlatOuter(partial(torch.optim.SGD, lr=1.0))
    world = World(tmp_path, outer=outer)
    world.round([row(1), row(2)], [1.5, 0.5])
    world.follow()
    expected = row(0) - (1.5 * row(1) + 0.5 * row(2)) / 2
    assert torch.allclose(world.base, expected, atol=1e-6)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_an_encoding_loses_is_sent_later(tmp_path: Path, codec: str) -> None:
    world = World(tmp_path, codec, FlatOuter(partial(torch.optim.SGD, lr=1.0)))
    for turn in range(12):
        world.round([row(turn) if turn < 4 else torch.zeros(1, N)])
        assert world.follow().kind is UpdateKind.DELTAS
    true = world.state.by_name()["w"]
    left = (world.base[0] - true).norm() / true.norm()
    assert left < 1e-6


def test_a_worker_that_missed_rounds_gets_the_differences_in_turn(tmp_path: Path) -> None:
    world = World(tmp_path, "int4")
    for turn in range(3):
        world.round([row(turn)])
    assert len(world.follow().files) == 3


def test_a_worker_far_behind_or_from_elsewhere_gets_all(tmp_path: Path) -> None:
    world = World(tmp_path, "int8")
    for turn in range(6):
        world.round([row(turn)])
    assert world.follow().kind is UpdateKind.FULL
    world.round([row(9)])
    assert world.state.update_for(0, 6, "another").kind is UpdateKind.FULL
    assert world.state.update_for(0, 99, world.at.identity).kind is UpdateKind.FULL


def test_old_news_give_their_files_to_newer_ones(tmp_path: Path) -> None:
    world = World(tmp_path, "int8")
    for turn in range(12):
        world.round([row(turn)])
    files = {path.name for path in (tmp_path / "news").iterdir()}
    assert {name for name in files if name.endswith(".delta")} == {
        f"f0-v{version}.delta" for version in (9, 10, 11, 12)
    }
    assert len(files) == 5  # and the one that the next version will be written into


def test_news_that_are_being_read_are_not_written_over(tmp_path: Path) -> None:
    world = World(tmp_path, "int8")
    world.round([row(1)])
    with (
        world.state.reading("f0-v1.delta") as path,
        path.open("rb") as file,
    ):
        before = path.read_bytes()
        for turn in range(12):
            world.round([row(turn)])
        assert not path.exists()
        assert file.read() == before


def test_weights_that_a_failed_step_left_half_stepped_are_not_stepped_saved_or_told(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    (tmp_path / "news" / "next").mkdir()  # nothing can be written there
    with pytest.raises(IsADirectoryError):
        world.round([row(1)])
    with pytest.raises(OSError, match="an outer step failed"):
        world.round([row(1)])
    with pytest.raises(OSError, match="an outer step failed"):
        world.state.state_dict()
    with pytest.raises(OSError, match="an outer step failed"):
        world.state.update_for(0, 9, "another")


# An old failing that must not come back: each of the first N - 1 submissions counted twice.
def test_delayed_nesterov_counts_each_submission_once(tmp_path: Path) -> None:
    world = World(tmp_path, outer=DelayedNesterov(lr=0.7, momentum=0.9, buffer=4))
    before = world.state.by_name()["w"].clone()
    for _ in range(4):
        world.round([torch.ones(1, N)])
    moved = before - world.state.by_name()["w"]
    assert torch.allclose(moved, torch.full((N,), 1.33), atol=1e-5)


def test_delayed_nesterov_continues_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    through = World(tmp_path / "a", outer=DelayedNesterov(lr=0.7, momentum=0.9, buffer=4))
    halves = World(tmp_path / "b", outer=DelayedNesterov(lr=0.7, momentum=0.9, buffer=4))
    for turn in range(6):
        through.round([row(turn)])
        halves.round([row(turn)])
        saved = halves.state.state_dict()["rows"][0]
        again = DelayedNesterov(lr=0.7, momentum=0.9, buffer=4)
        halves.state = ServerWeights(
            halves.state.shape,
            codec_of("fp32"),
            again,
            [saved["weights"]],
            tmp_path / "n",
            [turn + 1],
        )
        halves.state.load_outer({"rows": [saved]})
    assert torch.equal(through.state.by_name()["w"], halves.state.by_name()["w"])


def intake(path: Path, limit: float = 1e9, codec: str = "bf16") -> Upload:
    return Upload(path / "upload", module.Chunks(N, codec_of(codec)), limit)


def feed(one: Upload, numbers: Tensor) -> None:
    for index in range(one.have, one.chunks.count):
        data = one.chunks.encode(index, numbers[:, one.chunks.span(index)])
        one.take(index, memoryview(data))


def test_an_upload_goes_on_where_it_broke(tmp_path: Path) -> None:
    one = intake(tmp_path)
    one.take(0, memoryview(one.chunks.encode(0, row(1)[:, :512])))
    assert (one.have, one.is_complete) == (1, False)
    feed(one, row(1))
    one.take(0, memoryview(b"again"))
    assert one.is_complete
    assert one.path.stat().st_size == one.chunks.nbytes


# An old failing that must not come back: one NaN spoilt the model, and was answered with 200.
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_numbers_that_would_spoil_the_weights_are_refused(tmp_path: Path, bad: float) -> None:
    numbers = row(1)
    numbers[0, 1299] = bad
    with pytest.raises(Unfit, match="diverged"):
        feed(intake(tmp_path), numbers)


def test_a_delta_beyond_the_norm_bound_is_refused(tmp_path: Path) -> None:
    limit = norm_limit(10.0, N, 10.0)
    feed(intake(tmp_path, limit), row(1))
    with pytest.raises(Unfit, match="--norm-bound"):
        feed(intake(tmp_path, limit), row(1) * 100)


def test_chunks_out_of_turn_or_damaged_are_refused(tmp_path: Path) -> None:
    one = intake(tmp_path)
    with pytest.raises(Refused, match="go on from there"):
        one.take(1, memoryview(b""))
    with pytest.raises(Refused, match="send it again"):
        one.take(0, memoryview(b"garbage"))
    feed(one, row(1))
