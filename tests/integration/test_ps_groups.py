"""A worker of several ranks: real gloo ranks, a real server, DDP and FSDP2 on the CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ps import options, plain_outer
from helpers.ranks import Rank, ranks
from integration.test_ps_faults import TOKENS, Voice
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from torchft.errors import MismatchError, SettingsError, TorchftError, UnreachableError
from torchft.parameter_server.auth import Scope
from torchft.parameter_server.server.server import Address, DiLoCoServer
from torchft.parameter_server.worker.worker import DiLoCoWorker

STEPS, BATCH = 12, 8


class Small(nn.Module):
    """Odd sizes, so that shards are uneven."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale


def batch(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part: slice) -> None:
    """On this rank's part of each batch."""
    for step in steps:
        x = batch(step)[part]
        optimizer.zero_grad()
        ((model(x) - x.flip(1)) ** 2).mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> list[float]:
    """All weights; of a sharded model all ranks call this together."""
    found: list[Any] = [p.detach() for p in model.parameters()]
    flat = [getattr(p, "full_tensor", lambda p=p: p)().reshape(-1) for p in found]
    return torch.cat(flat).tolist()


def wrapped(kind: str, seed: int, width: int = 5) -> nn.Module:
    model = Small(seed, width)
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


class Member:
    """One rank of a group: torch.distributed, a wrapped model, a worker that is not started."""

    def __init__(self, rank: Rank, kind: str, server: str, *, width: int = 5, **more: Any) -> None:
        host, port = rank.store.split(":")
        store = dist.TCPStore(host, int(port), is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world_size)
        half = BATCH // rank.world_size
        self.part = slice(half * rank.rank, half * (rank.rank + 1))
        # Only DDP itself makes the ranks equal; FSDP2 takes of each what it has.
        self.model = wrapped(kind, 0 if kind == "fsdp" else rank.rank, width)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        settings = {"sync_every": 4, "codec": "fp32", "worker_id": "group", **more}
        settings.setdefault("auth_token", TOKENS.by_scope[Scope.WORKER])
        self.worker = DiLoCoWorker(self.model, self.optimizer, server, **settings)

    def train(self, first: int, steps: int) -> None:
        train(self.model, self.optimizer, range(first, first + steps), self.part)


@contextlib.contextmanager
def server_in(folder: Path, port: int = 0, **more: Any) -> Iterator[DiLoCoServer]:
    opts = options(folder, workers=1, **more)
    with DiLoCoServer(opts, Address(port=port, tokens=TOKENS)) as server:
        yield server


def weights_of(rank: Rank, kind: str, server: str, settings: dict[str, Any]) -> None:
    member = Member(rank, kind, server, **settings)
    with member.worker as worker:
        member.train(0, STEPS)
        rank.tell((whole(member.model), worker.sync_count))
    rank.tell(whole(member.model))


@pytest.mark.parametrize("settings", [{}, {"codec": "int8", "num_fragments": 2}], ids=str)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_group_is_as_one_worker_with_all_of_its_batches(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    with server_in(tmp_path / "alone") as server:
        model = Small(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        secret = TOKENS.by_scope[Scope.WORKER]
        common = {"sync_every": 4, "codec": "fp32", "auth_token": secret, **settings}
        with DiLoCoWorker(model, optimizer, server.address, **common) as alone:
            train(model, optimizer, range(STEPS), slice(None))
            expected, rounds = whole(model), alone.sync_count
    with server_in(tmp_path / "group") as server:
        with ranks(2, weights_of, kind, server.address, settings) as group:
            (one, synced), (other, also) = group.hear_all()
            assert one == other
            assert synced == also == rounds
            # A mean of two halves is rounded otherwise than one of the whole.
            assert one == pytest.approx(expected, abs=1e-3 if settings else 1e-6)
            last, also_last = group.hear_all()
            assert last == also_last
        status = Voice(server.address, "group").status()
        assert status["departures"] == {"left": 1}, "the group was one worker"


def test_one_rank_alone_may_have_sharded_parameters(tmp_path: Path) -> None:
    with (
        server_in(tmp_path) as server,
        ranks(1, weights_of, "fsdp", server.address, {}) as group,
    ):
        ((weights, synced),) = group.hear_all()
        assert synced == 3
        assert group.hear_all() == [weights], "the last news are there already"


def follows(rank: Rank, kind: str, server: str) -> None:
    member = Member(rank, kind, server, timeout_s=20.0)
    with member.worker:
        member.train(0, 4)
        rank.tell("in step")
        rank.listen()
        member.train(4, 12)
        rank.tell((whole(member.model), member.worker.local_step))
        rank.listen()
        while member.worker.sync_count < 2:  # which is the same at all ranks
            member.train(member.worker.local_step, 4)
            time.sleep(0.02)
        rank.tell((whole(member.model), member.worker.sync_count))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_server_goes_away_and_all_ranks_train_on(tmp_path: Path, kind: str) -> None:
    opts = options(tmp_path, workers=1, save_every=1, outer_optimizer=plain_outer)
    server = DiLoCoServer(opts, Address(port=0, tokens=TOKENS)).start()
    with ranks(2, follows, kind, server.address) as group:
        group.hear_all()
        port = server.port
        server.stop(save=False)
        group.tell("go on")
        (one, steps), (other, also) = group.hear_all()
        assert one == other, "DDP and FSDP keep the ranks equal"
        assert steps == also == 16
        again = DiLoCoServer(opts, Address(port=port, tokens=TOKENS)).start()
        group.tell("go on")
        (one, synced), (other, also) = group.hear_all()
        assert one == other
        assert synced == also >= 2, "what was trained meanwhile counts"
        for process in group.processes:
            process.join(60)
        again.stop()


def stops_at(rank: Rank, server: str, settings: dict[str, Any], width: int) -> None:
    try:
        Member(rank, "ddp", server, width=width, **settings).worker.start()
    except TorchftError as error:
        rank.tell((type(error), str(error)))


@pytest.mark.parametrize(
    ("settings", "width", "kind", "words"),
    [
        ({"auth_token": "no such token, but long"}, 5, TorchftError, "no valid token"),
        ({}, 6, MismatchError, "layers.0.weight is [6, 3] float32 there"),
    ],
)
def test_the_server_says_no_and_every_rank_hears_why(
    tmp_path: Path, settings: dict[str, Any], width: int, kind: type[Exception], words: str
) -> None:
    with server_in(tmp_path) as server:
        model = Small(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = DiLoCoWorker(
            model, optimizer, server.address, auth_token=TOKENS.by_scope[Scope.WORKER]
        )
        with first, ranks(2, stops_at, server.address, settings, width) as group:
            told = group.hear_all()
    assert told[0] == told[1]
    assert issubclass(told[0][0], kind) and words in told[0][1]


def test_there_is_no_server_and_every_rank_hears_it() -> None:
    with ranks(2, stops_at, "127.0.0.1:1", {"timeout_s": 0.3}, 5) as group:
        (kind, text), other = group.hear_all()
    assert (kind, text) == other
    assert kind is UnreachableError and "no answer from the parameter server" in text


def diverges(rank: Rank, server: str) -> None:
    member = Member(rank, "fsdp", server)
    with member.worker as worker:
        member.train(0, 4)
        good = whole(member.model)
        with torch.no_grad():
            for parameter in member.model.parameters():
                parameter.fill_(float("nan"))
        member.optimizer.zero_grad()
        member.optimizer.step()
        worker.force_sync()
        rank.tell((whole(member.model) == good, worker.refused))
        member.train(4, 1)


def test_work_that_is_refused_is_taken_back_at_all_ranks(tmp_path: Path) -> None:
    with (
        server_in(tmp_path, outer_optimizer=plain_outer) as server,
        ranks(2, diverges, server.address) as group,
    ):
        assert group.hear_all() == [(True, 1)] * 2


def counts(rank: Rank, server: str) -> None:
    member = Member(rank, "ddp", server, tokens=lambda: 10 * (rank.rank + 1))
    with member.worker:
        member.train(0, 4)
        rank.tell("in step")
        rank.listen()


def test_tokens_are_those_of_all_ranks(tmp_path: Path) -> None:
    with (
        server_in(tmp_path, save_every=100) as server,
        ranks(2, counts, server.address) as group,
    ):
        group.hear_all()
        (journal,) = (tmp_path / "journal").glob("*.jsonl")
        assert '"tokens": 120' in journal.read_text(), "4 steps of 10 and 20"
        group.tell("end")


def outside(rank: Rank, server: str) -> None:
    try:
        member = _of_one(rank, server)
    except SettingsError as error:
        rank.tell(str(error))
    else:
        rank.tell(str(member.worker_id))


def _of_one(rank: Rank, server: str) -> DiLoCoWorker:
    host, port = rank.store.split(":")
    store = dist.TCPStore(host, int(port), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world_size)
    first = dist.new_group([0])
    model = wrapped("fsdp", 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return DiLoCoWorker(model, optimizer, server, process_group=first, worker_id="x")


def test_a_group_that_does_not_fit_is_refused() -> None:
    with ranks(2, outside, "127.0.0.1:1") as group:
        one, other = group.hear_all()
    assert "is sharded over ranks [0, 1], and the worker's process_group has only [0]" in one
    assert "rank 1 is not in the process_group" in other
