"""Numbers that are none, or of no use: named, with the range that they must be in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torchft.errors import SettingsError
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    Inner,
    OptimSpec,
    ScheduleSpec,
    SPARTAStrategy,
    TopKStrategy,
)

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: DiLoCoStrategy(max_norm="x"), "max_norm='x': it must be a number, above 0"),  # type: ignore[arg-type]
    (lambda: DiLoCoStrategy(max_norm=True), "max_norm=True: it must be a number, above 0"),
    (lambda: Inner(max_norm=float("inf")), "max_norm=inf: it must be a finite number, above 0"),
    (lambda: DeMoStrategy(max_norm=-1), "max_norm=-1: it must be a number, above 0"),
    (lambda: DeMoStrategy(compression_decay="x"), "compression_decay='x': .* 0 and below 1"),  # type: ignore[arg-type]
    (lambda: DeMoStrategy(compression_topk=2.5), "compression_topk=2.5: .* an integer"),  # type: ignore[arg-type]
    (lambda: DeMoStrategy(weight_decay="x"), "weight_decay='x': .* at least 0"),  # type: ignore[arg-type]
    (lambda: SPARTAStrategy(p_sparta="x"), "p='x': it must be a number, above 0 and at most 1"),  # type: ignore[arg-type]
    (lambda: TopKStrategy(topk="x"), "topk='x': it must be an integer, at least 1"),  # type: ignore[arg-type]
    (lambda: TopKStrategy(decay=[0.9]), r"decay=\[0.9\]: it must be a number, at least 0"),  # type: ignore[arg-type]
    (lambda: FedAvgStrategy(island_size="x"), "island_size='x': it must be an integer"),  # type: ignore[arg-type]
    (lambda: ScheduleSpec("lambda_cosine", warmup_steps="x"), "warmup_steps='x': .* at least 0"),
    (lambda: OptimSpec(torch.optim.AdamW, lr=[1e-3, 1e-4]), r"AdamW: lr=\[.*\] must be one numb"),
    (lambda: OptimSpec(torch.optim.AdamW, lr="1e-3"), "AdamW: lr='1e-3' must be one number"),
    (lambda: OptimSpec.from_string("sgd", lr=(0.1,)), r"SGD: lr=\(0.1,\) must be one number"),
]


@pytest.mark.parametrize(("make", "said"), WRONG, ids=[said[:24] for _, said in WRONG])
def test_what_is_no_such_number_is_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make()


def test_what_counts_or_measures_may_be_numpys() -> None:
    assert Inner(max_norm=np.float32(0.5)).max_norm == 0.5  # type: ignore[arg-type]
    assert TopKStrategy(topk=np.int64(4))  # type: ignore[arg-type]
