"""`transformers.Trainer` on several ranks as one worker: real gloo ranks, a real server."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import options, plain_outer
from helpers.ranks import Rank, ranks
from integration.test_ps_transformers import Rows, Tiny
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchft.parameter_server.server.server import DiLoCoServer

transformers = pytest.importorskip("transformers")

from torchft.integrations import DiLoCoCallback  # noqa: E402

BATCH, STEPS, EVERY = 4, 10, 4
DEADLINE_S = 120.0
"""Each rank imports the Trainer."""


def whole(model: torch.nn.Module) -> list[float]:
    found = [p.detach() for p in model.parameters()]
    flat = [(p.full_tensor() if isinstance(p, DTensor) else p).reshape(-1) for p in found]
    return torch.cat(flat).tolist()


def trainer(folder: Path, ranks: int = 1, *, sharded: bool = False) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH // ranks,
        max_steps=STEPS,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        remove_unused_columns=False,
    )
    assert arguments.world_size == ranks
    model = fully_shard(Tiny()) if sharded else Tiny()
    made = transformers.Trainer(model, arguments, train_dataset=Rows())
    if sharded:
        # Accelerate shards where there are accelerators; on CPUs it knows DDP alone.
        made.accelerator.prepare_model = lambda model, **_: model
    return made


def train(rank: Rank, folder: str, servers: list[str]) -> None:
    host, port = rank.store.split(":")
    numbers = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world_size}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for server, sharded in zip(servers, (False, True), strict=True):
        made = trainer(Path(folder), rank.world_size, sharded=sharded)
        callback = DiLoCoCallback(server, sync_every=EVERY, worker_id="group", codec="fp32")
        made.add_callback(callback)
        made.train()
        assert callback.worker is not None
        assert isinstance(next(made.model.parameters()), DTensor) == sharded
        rank.tell((whole(made.model), callback.worker.sync_count))


def test_the_ranks_of_a_trainer_are_one_worker_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone")
    alone.train()
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                DiLoCoServer(options(tmp_path / kind, 1, outer_optimizer=plain_outer, codec="fp32"))
            ).address
            for kind in ("ddp", "fsdp2")
        ]
        group = stack.enter_context(ranks(2, train, str(tmp_path), servers, deadline_s=DEADLINE_S))
        for _ in servers:
            (one, synced), (other, also) = group.hear_all()
            assert one == other
            assert synced == also == 3, "after 4, 8, and the last two steps"
            assert one == pytest.approx(whole(alone.model), abs=1e-5)
