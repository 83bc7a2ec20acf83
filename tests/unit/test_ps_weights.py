"""A worker's weights: what is sent, what is kept, what is adopted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ps import Net
from torch import nn

from torchft.errors import SettingsError
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.server.weights import UpdateKind
from torchft.parameter_server.worker.sharded import named_parameters
from torchft.parameter_server.worker.weights import WorkerWeights
from torchft.parameter_server.worker.worker import DiLoCoWorker
from torchft.quantization import codec_of


class World:
    def __init__(self, folder: Path, codec: str = "fp32", dtype: torch.dtype = torch.float32):
        self.folder, self.codec = folder, codec_of(codec)
        self.model = Net().to(dtype)
        named = named_parameters(self.model)
        self.shape = ModelShape.of(named.items())
        self.weights = WorkerWeights(named, self.shape)
        self.n = self.shape.size(0)
        self.weights.load(0, self.whole(torch.zeros(1, self.n)), self.codec)
        self.weights.restore(0)

    def chunks(self) -> Chunks:
        return Chunks(self.n, self.codec)

    def whole(self, row: torch.Tensor) -> list[tuple[UpdateKind, Path]]:
        path = self.folder / "whole"
        path.write_bytes(Chunks(self.n, codec_of("fp32")).encode(0, row))
        return [(UpdateKind.FULL, path)]

    def move(self, by: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(by)

    def now(self) -> torch.Tensor:
        return self.weights.row(0)


def test_a_compiled_model_has_the_names_of_the_one_that_it_was_compiled_from() -> None:
    plain = nn.Linear(3, 3)
    compiled = torch.compile(plain, backend="eager")
    assert list(named_parameters(compiled)) == list(named_parameters(plain)) == ["weight", "bias"]


def test_without_steps_in_flight_the_weights_become_the_base_bit_for_bit(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.move(0.1)
    sent = world.weights.encode(0, world.chunks())
    new = torch.randn(1, world.n)
    world.weights.apply(0, sent, world.whole(new), world.codec)
    assert torch.equal(world.now(), new)


def test_a_parameter_without_a_flat_view_is_read_and_written_too(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    named = named_parameters(model)
    weights = WorkerWeights(named, ModelShape.of(named.items()))
    row = torch.arange(52.0)[None]
    (tmp_path / "whole").write_bytes(Chunks(52, codec_of("fp32")).encode(0, row))
    weights.load(0, [(UpdateKind.FULL, tmp_path / "whole")], codec_of("fp32"))
    weights.restore(0)
    assert torch.equal(weights.row(0), row)
    assert torch.equal(model.weight, row[0, :48].view(4, 3, 2, 2))


# An old failing that must not come back: steps taken in flight were overwritten.
def test_steps_taken_in_flight_are_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.move(0.25)
    sent = world.weights.encode(0, world.chunks())
    world.move(0.5)
    world.weights.apply(0, sent, world.whole(torch.full((1, world.n), 2.0)), world.codec)
    assert torch.equal(world.now(), torch.full((1, world.n), 2.5))


def test_a_share_of_its_own_weights_can_be_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.move(1.0)
    sent = world.weights.encode(0, world.chunks())
    world.weights.apply(0, sent, world.whole(torch.full((1, world.n), 2.0)), world.codec, mix=0.25)
    assert torch.allclose(world.now(), torch.full((1, world.n), 1.75))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_the_encoding_lost_is_sent_later(
    tmp_path: Path, codec: str, dtype: torch.dtype
) -> None:
    world = World(tmp_path, codec, dtype)
    total = torch.zeros(1, world.n)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in named_parameters(world.model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    trained = world.now().clone()
    for _ in range(12):
        sent = world.weights.encode(0, world.chunks())
        world.chunks().decode(0, memoryview(sent[0]), decoded := torch.empty(1, world.n))
        total -= decoded
        world.weights.apply(0, sent, world.whole(total), world.codec)
    atol = 1e-6 if dtype == torch.float32 else 2e-5  # a place of bf16 is 8e-3 here
    assert torch.allclose(total, trained, atol=atol)
    assert torch.allclose(world.now(), trained, atol=1e-6)


def outer_rounds(world: World, rate: float, rounds: int, **options: float) -> torch.Tensor:
    """Each moves all weights down by one place of bf16 below 1, and the server takes `rate` of what
    it understands. The server's weights."""
    server = torch.ones(1, world.n)
    world.weights.load(0, world.whole(server), world.codec)
    world.weights.restore(0)
    for _ in range(rounds):
        world.move(-(2.0**-8))
        sent = world.weights.encode(0, world.chunks())
        world.chunks().decode(0, memoryview(sent[0]), delta := torch.empty(1, world.n))
        server = server - rate * delta
        world.weights.apply(0, sent, world.whole(server), world.codec, **options)
    return server


# An old failing of the strategies that must not come back here either.
def test_outer_steps_below_the_last_place_of_bf16_add_up(tmp_path: Path) -> None:
    world = World(tmp_path, dtype=torch.bfloat16)
    server = outer_rounds(world, 0.3, 20)
    assert torch.allclose(server, torch.full_like(server, 1 - 20 * 0.3 * 2**-8), atol=1e-6)
    assert torch.equal(world.now(), server.bfloat16().float())
    assert not world.weights._hidden, "all of it arrives, so nothing is kept"


def test_a_share_of_its_own_weights_is_rounded_once(tmp_path: Path) -> None:
    """An old failing: the news were rounded to bf16, and then the mixture again."""
    world = World(tmp_path, dtype=torch.bfloat16)
    world.weights.load(0, world.whole(torch.full((1, world.n), 1.0)), world.codec)
    world.weights.restore(0)
    sent = world.weights.encode(0, world.chunks())
    place = 2.0**-7
    world.move(place)
    news = torch.full((1, world.n), 1 + 0.6 * place)
    world.weights.apply(0, sent, world.whole(news), world.codec, mix=0.5)
    # Half of 1 place and half of 1.6 are 1.3: one. Half of 2 would have made it 1.5, and so two.
    assert torch.equal(world.now(), torch.full((1, world.n), 1 + place))


@pytest.mark.parametrize("mix", [0.0, 0.25])
def test_a_group_of_ranks_computes_the_same_in_bf16(tmp_path: Path, mix: float) -> None:
    """What a lone worker does chunk by chunk, the first rank of a group does over a whole row."""
    one, group = (World(tmp_path, "int4", torch.bfloat16) for _ in range(2))
    group.weights._sharded = True
    of_one, of_group = (outer_rounds(world, 0.3, 9, mix=mix) for world in (one, group))
    assert torch.equal(of_one, of_group)
    assert torch.equal(one.now(), group.now())


def test_what_bf16_cannot_show_survives_a_base_that_is_fetched_anew(tmp_path: Path) -> None:
    world = World(tmp_path, "int4", torch.bfloat16)
    outer_rounds(world, 0.3, 3)
    with torch.no_grad():
        for parameter in named_parameters(world.model).values():
            parameter.add_(torch.randn(parameter.shape))
    sent = world.weights.encode(0, world.chunks())
    world.weights.apply(0, sent, world.whole(torch.ones(1, world.n)), world.codec)
    assert world.weights._hidden, "int4 lost less than a place of some"
    kept = world.weights.beyond_base(0)
    world.weights.restore(0, kept)
    assert torch.allclose(world.weights.beyond_base(0), kept, rtol=2**-8, atol=1e-9)


def test_a_model_in_bf16_does_not_send_its_rounding(tmp_path: Path) -> None:
    world = World(tmp_path, dtype=torch.bfloat16)
    world.weights.load(0, world.whole(torch.full((1, world.n), 1.001)), world.codec)
    world.weights.restore(0)
    (sent,) = world.weights.encode(0, world.chunks())
    world.chunks().decode(0, memoryview(sent), decoded := torch.empty(1, world.n))
    assert not decoded.any()


def test_buffers_frozen_and_tied_parameters_do_not_travel() -> None:
    names = list(named_parameters(Net()))
    assert "frozen" not in names
    assert "head.weight" not in names, "it is h.0.weight"
    assert not [name for name in names if "running" in name]


# An error of ours that must not come back: a raw NotImplementedError.
def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(SettingsError, match=r"h\.0\.weight has no values yet.*to_empty"):
        DiLoCoWorker(model, torch.optim.SGD(model.parameters()), "127.0.0.1:1")


# An error of ours that must not come back: deltas of zeros were submitted.
def test_an_optimizer_of_another_model_is_refused() -> None:
    of_another = torch.optim.SGD(Net().parameters())
    with pytest.raises(SettingsError, match="steps none of the model's 11 trained parameters"):
        DiLoCoWorker(Net(), of_another, "127.0.0.1:1")
    DiLoCoWorker(Net(), of_another, "")  # nothing is done, so nothing is wrong


def test_an_optimizer_of_a_part_of_the_model_is_one_of_it() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    assert DiLoCoWorker(compiled, torch.optim.SGD(model.h.parameters()), "127.0.0.1:1").active


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(SettingsError, match="no parameter"):
        named_parameters(torch.nn.BatchNorm1d(3, affine=False))
