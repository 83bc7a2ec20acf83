"""The same bits through a parameter server and in the simulation; `make digests` has all eight."""

from __future__ import annotations

import pytest
from helpers.halved import Halved

from torchft.strategies.strategy import Strategy
from torchft.verify.digests import SERVED, experiment_of, serve
from torchft.verify.served import Served, compare_served


@pytest.mark.parametrize("name", ["DiLoCo", "DiLoCo int4", "Streaming DiLoCo", "Streaming int8"])
def test_workers_of_a_server_are_equal_to_simulated_nodes(name: str) -> None:
    pair = serve(name, steps=24, nodes=3, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    distance = SERVED[name].sync_every // SERVED[name].fragments
    assert list(pair.real) == list(range(distance - 1, 24, distance))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiLoCo", "DiLoCo int4", "Streaming int8"])
def test_workers_whose_parameters_are_bf16_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.verify.digests.OddModel", Halved)
    pair = serve(name, steps=36, nodes=3, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"


class Mistaken(Served):
    """Simulates what peers do with a codec, which is not what a server does."""

    def strategy(self, named: Strategy) -> Strategy:
        return named


def test_a_server_that_does_something_else_is_seen_at_the_first_round() -> None:
    experiment = experiment_of("DiLoCo int8", steps=20, nodes=2)
    pair = compare_served(experiment, Mistaken(10, 1, "int8"), method="fork")
    assert pair.first_difference == 9
    assert not pair.server_ends_equal and not pair.equal
