"""A model as the server sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchft.errors import MismatchError, SettingsError
from torchft.parameter_server.core.shape import ModelShape


def shape(parts: int = 1, layers: int = 6, width: int = 8) -> ModelShape:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(100, width),
            "h": nn.ModuleList(nn.Linear(width, width) for _ in range(layers)),
        }
    )
    return ModelShape.of(model.named_parameters()).cut(parts)


def test_no_block_is_cut() -> None:
    cut = shape(parts=3)
    names = [[p.name for p in cut.of_fragment(f)] for f in range(3)]
    assert names[0] == ["embed.weight"]
    assert all({"weight", "bias"} == {n.rsplit(".", 1)[1] for n in part} for part in names[1:])
    assert sum(cut.size(f) for f in range(3)) == cut.numel


def test_more_fragments_than_blocks_cut_between_parameters() -> None:
    assert len(shape(parts=10, layers=6).fragments) == 10
    with pytest.raises(SettingsError, match="cannot be"):
        shape(parts=99)


def test_a_shape_survives_its_journey() -> None:
    for parts in (1, 4):
        assert ModelShape.from_json(shape(parts).to_json()) == shape(parts)


def test_fragments_are_no_part_of_the_fingerprint() -> None:
    assert shape(1).fingerprint == shape(4).fingerprint != shape(layers=5).fingerprint


def test_the_difference_is_named() -> None:
    with pytest.raises(MismatchError, match=r"it lacks h\.5\.weight"):
        shape().check_same(shape(layers=5))
    with pytest.raises(MismatchError, match=r"h\.6\.weight, which is unknown"):
        shape().check_same(shape(layers=7))
    with pytest.raises(MismatchError, match=r"embed.weight is \[100, 9\] float32 there"):
        shape().check_same(shape(width=9))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"parameters": [], "fragments": []},
        {"parameters": [["a", [2], "float32"]], "fragments": []},
        {"parameters": [["a", [2], "float32"]], "fragments": [[0, 2]]},
        {"parameters": [["a", [-2], "float32"]], "fragments": [[0]]},
        {"parameters": [["a", [2], "int64"]], "fragments": [[0]]},
        {"parameters": [["a", [2], "load"]], "fragments": [[0]]},
        {"parameters": [["a", [2.5], "float32"]], "fragments": [[0]]},
        {"parameters": 3, "fragments": None},
        {"parameters": [["a", [2], "float32"], ["a", [2], "float32"]], "fragments": [[0, 1]]},
    ],
)
def test_what_describes_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(MismatchError):
        ModelShape.from_json(wrong)


def test_views_are_the_parameters() -> None:
    cut = shape(parts=2)
    flat = torch.arange(float(cut.size(1)))[None]
    views = cut.views(1, flat)
    assert list(views) == [p.name for p in cut.of_fragment(1)]
    assert torch.equal(torch.cat([v.reshape(-1) for v in views.values()]), flat[0])
