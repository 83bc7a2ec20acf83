"""Batches as people have them: dicts for models of transformers, texts beside tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.experiments import Trainer
from torchft.simulator.node import TrainNode, micro_batches
from torchft.simulator.result import Result
from torchft.strategies import DiLoCoStrategy, OptimSpec

IDS = torch.randint(31, (24, 6), generator=torch.Generator().manual_seed(0))


def fit(model: Any, data: Any, val: Any = None, **settings: Any) -> Result:
    trainer = Trainer(model, data, val, device="cpu")
    strategy = DiLoCoStrategy(OptimSpec(torch.optim.AdamW, lr=1e-2), H=2)
    given = {"num_nodes": 2, "max_steps": 3, "batch_size": 4, "disable_logging": True}
    trainer.fit(strategy=strategy, **{**given, **settings})
    assert trainer.result is not None
    return trainer.result


@pytest.mark.slow  # for the import alone; `TestDicts` has the same situations
class TestModelsOfTransformers:
    @pytest.fixture
    def llama(self) -> Any:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 31}
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))

    def test_run_as_they_are(self, llama: Any) -> None:
        data = {"input_ids": IDS, "labels": IDS}
        result = fit(llama, data, data)
        output = llama(input_ids=IDS, labels=IDS)
        assert result.validations[0]["global_loss"] == pytest.approx(float(output.loss), rel=1e-5)
        pieces = fit(llama, data, data, minibatch_size=1)
        assert pieces.final_loss == pytest.approx(result.final_loss, rel=1e-4)

    def test_say_that_labels_are_missing(self, llama: Any) -> None:
        with pytest.raises(SettingsError, match=r"returned a CausalLM.*if the batch has labels"):
            fit(llama, {"input_ids": IDS})


class Sums(nn.Module):
    """Its forward takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": ((x.float() * self.weight).sum(1) - y).pow(2).mean()}


class TestDicts:
    def test_go_by_keyword_and_a_loss_may_lie_in_a_dict(self) -> None:
        assert fit(Sums(), {"y": torch.ones(24), "x": IDS}).history

    def test_with_a_key_that_the_model_does_not_take_are_refused(self) -> None:
        data = {"x": IDS, "y": torch.ones(24), "idx": torch.arange(24)}
        with pytest.raises(SettingsError, match=r"batch has 'idx', which Sums.forward does not"):
            fit(Sums(), data)

    def test_stay_one_argument_of_a_model_that_takes_one(self) -> None:
        class TakesOne(Sums):
            def forward(self, x: Mapping[str, Tensor]) -> Any:  # type: ignore[override]
                assert isinstance(x, Mapping)
                return super().forward(x["x"], x["y"] if "y" in x else torch.ones(len(x["x"])))

        assert fit(TakesOne(), {"x": IDS, "y": torch.ones(24)}).history
        assert fit(TakesOne(), {"x": IDS}).history


class Pair(NamedTuple):
    x: Tensor
    names: list[str]


NAMES = ["a", "b", "c", "d", "e"]
X = torch.arange(5.0)


class TestPieces:
    """Of five samples, at most two at once."""

    @pytest.mark.parametrize(
        "batch",
        [
            {"x": X, "names": NAMES},
            [X, NAMES],
            (X, tuple(NAMES)),
            Pair(X, NAMES),
            {"x": X, "more": {"names": NAMES}},
            {"x": X, "names": np.array(NAMES)},
            {"x": X, "names": [[name] for name in NAMES]},
            {"x": X, "names": [{"name": name} for name in NAMES]},
        ],
    )
    def test_have_their_own_texts(self, batch: Any) -> None:
        pieces = [piece for piece, _ in micro_batches(batch, 2)]
        assert len(pieces) == 3
        for piece in pieces:
            assert type(piece) is type(batch)
            at = int(_tensor(piece)[0])
            assert _texts(piece) == NAMES[at : at + len(_tensor(piece))]

    def test_have_their_own_arrays(self) -> None:
        batch = {"x": X, "array": np.arange(5)}
        for piece, _ in micro_batches(batch, 2):
            assert piece["array"].tolist() == piece["x"].tolist()

    def test_have_all_of_what_is_not_by_sample(self) -> None:
        batch = {"x": X, "classes": ["cat", "dog"], "scale": 2.0, "name": "fives"}
        for piece, _ in micro_batches(batch, 2):
            assert {k: v for k, v in piece.items() if k != "x"} == {
                "classes": ["cat", "dog"],
                "scale": 2.0,
                "name": "fives",
            }

    def test_are_of_samples_where_the_batch_is_a_list_of_them(self) -> None:
        """Not of the channels of each picture."""
        pictures = [torch.full((3, 2, 2), float(at)) for at in range(5)]
        pieces = [piece for piece, _ in micro_batches(pictures, 2, 5)]
        assert [len(piece) for piece in pieces] == [2, 2, 1]
        assert all(picture.shape == (3, 2, 2) for piece in pieces for picture in piece)

    def test_of_a_list_of_samples_reach_the_model(self) -> None:
        seen = []

        class Sees(Sums):
            def forward(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
                seen.append([picture.shape[0] for picture in batch])
                return (torch.stack(batch).float() * self.weight).mean()

        options = {"collate_fn": list}
        samples = torch.utils.data.TensorDataset(IDS)
        fit(
            Sees(),
            [row.repeat(3, 1) for (row,) in samples],
            minibatch_size=2,
            dataloader_kwargs=options,
        )
        assert seen and all(shapes == [3, 3] for shapes in seen)

    def test_of_a_node_of_ones_own_without_a_batch_size(self) -> None:
        node = TrainNode(Sums(), node=0, device=torch.device("cpu"))
        batch = {"x": IDS[:4], "y": torch.ones(4)}
        whole = node.backward(batch)
        assert float(node.backward(batch, 2)) == pytest.approx(float(whole))


def _tensor(piece: Any) -> Tensor:
    values = piece.values() if isinstance(piece, dict) else piece
    return next(value for value in values if isinstance(value, Tensor))


def _texts(piece: Any) -> list[str]:
    if isinstance(piece, dict):
        piece = piece.get("names", piece.get("more", {}).get("names"))
    else:
        piece = piece[1]
    flat = []
    for one in piece:
        while not isinstance(one, str):
            one = one["name"] if isinstance(one, dict) else one[0]
        flat.append(str(one))
    return flat
