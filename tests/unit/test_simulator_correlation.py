"""How alike nodes are: against numpy's own figures, and where nothing can be said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from torchft.experiments import correlation as module
from torchft.experiments.correlation import correlation


def test_it_is_the_mean_over_pairs_of_numpys_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    torch.manual_seed(0)
    flats = [torch.randn(4, 33), torch.randn(4, 20).bfloat16() + 1]
    whole = torch.cat([flat.double() for flat in flats], dim=1).numpy()
    pairs = [np.corrcoef(whole[i], whole[j])[0, 1] for i, j in itertools.combinations(range(4), 2)]
    found = correlation(flats)
    assert found.pearson == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found.variance == pytest.approx(whole.var(0, ddof=1).mean(), rel=1e-12)


def test_equal_nodes_have_correlation_1_and_variance_0() -> None:
    found = correlation([torch.randn(1, 50).expand(3, 50)])
    assert found.pearson == pytest.approx(1.0, abs=1e-12)
    assert found.variance == 0.0


def test_opposite_nodes_have_correlation_minus_1() -> None:
    row = torch.randn(50)
    assert correlation([torch.stack([row, -row])]).pearson == pytest.approx(-1.0, abs=1e-12)


def test_one_node_has_nothing_to_correlate_with_and_says_so() -> None:
    found = correlation([torch.randn(1, 50)])
    assert (found.pearson, found.variance) == (None, None)
    assert str(found) == "1 node: nothing to correlate with"


def test_constant_weights_have_a_variance_but_no_coefficient() -> None:
    found = correlation([torch.tensor([[1.0, 1.0], [3.0, 3.0]])])
    assert found.pearson is None
    assert found.variance == 2.0
    assert "not defined" in str(found)
