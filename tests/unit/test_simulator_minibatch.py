"""The automatic minibatch: what memory allows; and pieces that add up to the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import odd, pairs
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchft.errors import SettingsError
from torchft.experiments import Trainer, minibatch
from torchft.experiments.minibatch import fitting_size, largest_that_fits, saved_bytes
from torchft.simulator import Experiment
from torchft.strategies import DiLoCoStrategy, OptimSpec


class Plain(nn.Module):
    """One matrix, no state: what it keeps for backward can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3, bias=False)

    def forward(self, batch: Any) -> Tensor:
        return torch.tanh(self.linear(batch[0])).mean()


def experiment(model: nn.Module | None = None, batch_size: int = 16) -> Experiment:
    return Experiment(
        model=model or odd(),
        train_dataset=pairs(),
        strategy=DiLoCoStrategy(H=4),
        num_nodes=2,
        max_steps=1,
        batch_size=batch_size,
        device="cpu",
    )


SAMPLE = 3 * 4
"""Bytes that a sample leaves: what tanh gave. The mean keeps none, the input is there anyway."""


def test_what_a_pass_keeps_is_counted_without_model_and_batch() -> None:
    batch = [torch.zeros(20, 7)[:10], torch.zeros(10)]
    assert saved_bytes(experiment().make_node(Plain(), 0), batch) == 10 * SAMPLE


@pytest.mark.parametrize(
    ("free", "size"), [(1 << 40, 16), (2 * SAMPLE * 16, 16), (2 * SAMPLE * 15, 8)]
)
def test_the_batch_is_halved_until_half_of_the_free_memory_holds_it(
    free: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minibatch, "free_memory", lambda: free)
    assert fitting_size(experiment(Plain())) == size


def test_one_sample_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minibatch, "free_memory", lambda: 0)
    assert fitting_size(experiment(Plain())) == 1


def test_where_the_memory_is_unknown_the_batch_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minibatch, "free_memory", lambda: None)
    assert fitting_size(experiment()) == 16


@pytest.mark.parametrize(("batch", "fits", "size"), [(16, 5, 4), (15, 5, 4), (7, 7, 7), (3, 1, 1)])
def test_halving_never_ends_below_what_fits_by_more_than_half(
    batch: int, fits: int, size: int
) -> None:
    assert largest_that_fits(batch, lambda size: size <= fits) == size


def test_the_free_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert minibatch._machine_free(tmp_path / "meminfo") == 5 * 1024
    assert minibatch._container_free(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert minibatch._container_free(tmp_path) is None
    assert minibatch._machine_free(tmp_path / "none") is None
    assert minibatch._container_free(tmp_path / "none") is None
    monkeypatch.setattr(minibatch, "_machine_free", lambda: 7)
    monkeypatch.setattr(minibatch, "_container_free", lambda: 3)
    assert minibatch.free_memory() == 3


def test_probing_changes_neither_model_nor_generators() -> None:
    run, state = experiment(), torch.get_rng_state()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}  # type: ignore[union-attr]
    fitting_size(run)
    assert torch.equal(torch.get_rng_state(), state)
    after = run.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_model_that_takes_whole_batches_only_gets_whole_batches() -> None:
    class Whole(Plain):
        def forward(self, batch: Any) -> Tensor:
            return super().forward([batch[0].view(16, 7)])

    assert fitting_size(experiment(Whole())) == 16


def test_a_batch_that_cannot_be_cut_stays_whole() -> None:
    class Texts(Dataset[str]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> str:
            return "text"

    run = experiment(Plain())
    run.train_dataset = Texts()
    run.dataloader_kwargs = {"collate_fn": lambda texts: frozenset(texts)}
    assert fitting_size(run) == 16


def test_a_model_without_a_scalar_loss_is_found_out() -> None:
    class Vector(Plain):
        def forward(self, batch: Any) -> Tensor:
            return self.linear(batch[0])

    with pytest.raises(SettingsError, match="return its loss"):
        fitting_size(experiment(Vector()))


def _weights(minibatch_size: int | None, tmp_path: Path) -> Tensor:
    torch.manual_seed(0)
    trainer = Trainer(Plain(), pairs(), device="cpu")
    strategy = DiLoCoStrategy(OptimSpec(torch.optim.SGD, lr=0.1), H=4)
    model = trainer.fit(
        1, strategy, 2, 5, 10, minibatch_size, log_dir=tmp_path, disable_logging=True
    )
    assert isinstance(model, Plain)
    return model.linear.weight.detach()


@pytest.mark.parametrize("size", [1, 3, 4, 10, 64])
def test_pieces_add_up_to_the_whole_batch_with_the_remainder(size: int, tmp_path: Path) -> None:
    torch.testing.assert_close(_weights(size, tmp_path), _weights(None, tmp_path))


def test_what_was_found_is_remembered_until_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(odd(), pairs(), device="cpu")
    calls: list[int] = []

    def counted(run: Experiment) -> int:
        calls.append(run.batch_size)
        return 4

    monkeypatch.setattr("torchft.experiments.trainer.fitting_size", counted)
    assert [trainer.find_minibatch_size(2, 16), trainer.find_minibatch_size(2, 16)] == [4, 4]
    assert trainer.find_minibatch_size(num_nodes=2, batch_size=8) == 4
    assert calls == [16, 8]
    trainer.find_minibatch_size(2, 16, force_recalculate=True)
    assert calls == [16, 8, 16]
    trainer.clear_minibatch_cache()
    trainer.find_minibatch_size(2, 8)
    assert calls == [16, 8, 16, 8]


def test_fit_cuts_its_batches_to_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Watch(Plain):
        def forward(self, batch: Any) -> Tensor:
            seen.append(len(batch[0]))
            return super().forward(batch)

    monkeypatch.setattr(minibatch, "free_memory", lambda: 2 * SAMPLE * 5)
    trainer = Trainer(Watch(), pairs(), device="cpu")
    options: dict[str, Any] = {"disable_logging": True, "log_dir": tmp_path}
    trainer.fit(1, DiLoCoStrategy(H=4), 1, 1, 9, **options)
    assert seen == [2, 5, 4]  # the probe, then the nine samples
    trainer.fit(1, DiLoCoStrategy(H=4), 1, 1, 9, **options)
    assert seen[3:] == [5, 4]
    trainer.fit(1, DiLoCoStrategy(H=4), 1, 1, 9, force_minibatch_recalculate=True, **options)
    assert seen[5:] == [2, 5, 4]


class Gpu:
    """Says what a GPU would: how much is free, and what a pass takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, per_sample: int = 0) -> None:
        self.tried: list[int] = []
        self.per_sample = per_sample
        for name, answer in {
            "mem_get_info": (free, 1 << 60),
            "empty_cache": None,
            "reset_peak_memory_stats": None,
            "memory_allocated": 100,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: self.peak())

    def peak(self) -> int:
        return 100 + self.per_sample * self.tried[-1]


def on_a_gpu(gpu: Gpu, holds: int, num_nodes: int = 1) -> int:
    class Tight(Plain):
        def forward(self, batch: Any) -> Tensor:
            gpu.tried.append(len(batch[0]))
            if len(batch[0]) > holds:
                raise torch.cuda.OutOfMemoryError("no room")
            return super().forward(batch)

    run = experiment()
    node, batch = run.make_node(Tight(), 0), run.feed().batch(0, 0)
    return largest_that_fits(16, minibatch._cuda_probe(node, batch, num_nodes))


def test_on_a_gpu_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, free=1 << 40)
    assert on_a_gpu(gpu, holds=5) == 4
    assert gpu.tried == [16, 8, 4]


def test_on_a_gpu_the_weights_of_all_nodes_have_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = 4 * 7 * 3 * 4  # with gradient and two moments
    free = int((10 * weights + 1000) / 0.9) + 1
    assert on_a_gpu(Gpu(monkeypatch, free, per_sample=100), holds=99, num_nodes=10) == 8
    assert on_a_gpu(Gpu(monkeypatch, free, per_sample=100), holds=99, num_nodes=5) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_runs_out_of_memory_and_gets_less() -> None:
    class Greedy(Plain):
        def forward(self, batch: Any) -> Tensor:
            free, _ = torch.cuda.mem_get_info()
            torch.empty(len(batch[0]) * free // 8, dtype=torch.uint8, device=batch[0].device)
            return super().forward(batch)

    run = experiment(Greedy())
    run.device = "cuda"
    assert fitting_size(run) == 4
