"""The same bits in the simulation and in real processes, at every synchronisation; `make digests`
prints the long version. The bytes that a simulation counts are those that the processes counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from helpers.halved import Halved
from torch import Tensor, nn

from torchft.quantization import Int8
from torchft.simulator.events import Dies, Joins
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    LocalSGDStrategy,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
)
from torchft.verify.digests import ADAMW, STRATEGIES, OddModel, Pair, compare, main

STEPS = 24
EVERY = {
    "LocalSGD": 10,
    "DiLoCo": 10,
    "DiLoCo bf16": 10,
    "DiLoCo int8": 10,
    "DiLoCo int4": 10,
    "Streaming DiLoCo": 4,
    "Streaming delayed": 4,
    "Streaming in flight": 4,
    "Streaming, strided": 4,
    "Streaming bf16": 4,
    "Streaming int8": 4,
    "Streaming int4": 4,
    "int4, fed back": 5,
}
"""Steps between two rounds, if more than one."""


@cache
def _pair(name: str, deterministic: bool) -> Pair:
    return compare(name, steps=STEPS, deterministic=deterministic, method="fork")


@pytest.mark.parametrize("name", STRATEGIES)
def test_simulated_and_real_nodes_are_equal_at_every_synchronisation(name: str) -> None:
    pair = _pair(name, True)
    assert pair.equal, f"they part at step {pair.first_difference}"
    every = EVERY.get(name, 1)
    first = 11 if name == "Streaming in flight" else every - 1  # none opens before the first step
    assert [step for step, _ in pair.real.digests] == list(range(first, STEPS, every))
    assert pair.real.history == pair.simulated.history
    assert pair.real.final_loss < 4.7


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_simulated_bytes_are_those_that_the_processes_counted(
    name: str, deterministic: bool
) -> None:
    pair = _pair(name, deterministic)
    assert pair.real.rounds == pair.simulated.rounds
    assert pair.real.bytes_sent == pair.simulated.bytes_sent
    assert min(pair.real.bytes_sent) > 0
    for record in pair.real.records:
        healed = record.step == 0  # with gradients, the first round gives all equal state
        assert record.bytes_sent == record.extra["round_bytes"] or healed


ENCODED: dict[str, Callable[[], Strategy]] = {
    "all-reduce": lambda: SimpleReduceStrategy(ADAMW, codec="fp8"),
    "LocalSGD": lambda: LocalSGDStrategy(ADAMW, H=3, codec=Int8(32)),
    "SPARTA-DiLoCo": lambda: SPARTADiLoCoStrategy(ADAMW, p_sparta=0.1, H=4, codec="bf16"),
    "all-reduce, fed back": lambda: SimpleReduceStrategy(ADAMW, codec="int4", error_feedback=True),
    "Streaming, fed back": lambda: StreamingDiLoCoStrategy(
        ADAMW, H=3, fragments=2, codec="int4", error_feedback=True
    ),
}


@pytest.mark.parametrize("name", ENCODED)
def test_encoded_gradients_weights_and_subsets_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, name, ENCODED[name])
    pair = compare(name, steps=9, nodes=3, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    assert pair.real.rounds == pair.simulated.rounds
    assert {one.kind for one in pair.real.rounds} == {"quantized"}


def test_what_is_in_flight_at_the_end_closes_in_both() -> None:
    # A round opens after step 21, and would close after step 24.
    pair = compare("Streaming delayed", steps=22, nodes=2, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    assert [step for step, _ in pair.real.digests][-2:] == [19, 21]
    assert pair.real.rounds == pair.simulated.rounds
    assert [(r.step, r.delay) for r in pair.real.rounds[-2:]] == [(19, 3), (21, 1)]


def test_a_node_that_is_killed_in_flight_heals_when_another_round_opens() -> None:
    events = [Dies(2, 9, in_round=True), Joins(2, 18)]
    pair = compare("Streaming delayed", steps=32, nodes=3, events=events, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    (heal,) = pair.real.heals
    # Rounds open after steps 1, 5, 9, …; steps count from 0 here.
    assert heal.step % 4 == 0 and heal.step >= 18
    assert [r.step for r in pair.real.rounds if not r.committed] == [15]
    assert pair.real.heals[0].step == pair.simulated.heals[0].step


class Normed(OddModel):
    """Its batches move running means and variances, and a count of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(23)


CARRIED: dict[str, Callable[[], Strategy]] = {
    "LocalSGD, buffers averaged": lambda: LocalSGDStrategy(ADAMW, H=3, buffers="averaged"),
    "DiLoCo, buffers copied, int8": lambda: DiLoCoStrategy(
        ADAMW, H=3, buffers="copied", codec="int8"
    ),
    "Streaming, strided, buffers averaged": lambda: StreamingDiLoCoStrategy(
        ADAMW, H=6, fragments=3, pattern="strided", buffers="averaged"
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_buffers_that_ride_along_are_equal_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, name, CARRIED[name])
    monkeypatch.setattr("torchft.verify.digests.OddModel", Normed)
    pair = compare(name, steps=12, nodes=3, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    assert pair.real.rounds == pair.simulated.rounds
    # The last step was a round, so all nodes hold the same.
    expected = pair.simulated.models[0].norm.state_dict()
    assert int(expected["num_batches_tracked"]) == 12
    for model in [*pair.real.models, *pair.simulated.models]:
        assert all(value.equal(expected[key]) for key, value in buffers_of(model).items())


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("norm."): buffer for name, buffer in model.named_buffers()}


HALF: dict[str, Callable[[], Strategy]] = {
    "Streaming, in flight and mixed": lambda: StreamingDiLoCoStrategy(
        ADAMW, H=6, fragments=2, delay=2, mix=0.5
    ),
    "LocalSGD": lambda: LocalSGDStrategy(ADAMW, H=3),
    "int8, fed back": lambda: DiLoCoStrategy(ADAMW, H=3, codec="int8", error_feedback=True),
    "top-k": lambda: TopKStrategy(ADAMW, H=3, topk=8, chunk=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_fp32_state_beside_half_precision_is_equal_after_a_kill_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, name, HALF[name])
    monkeypatch.setattr("torchft.verify.digests.OddModel", Halved)
    events = [Dies(2, 5, in_round=True), Joins(2, 8)]
    pair = compare(name, steps=15, nodes=3, events=events, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    assert len(pair.real.heals) == 1


READINGS: dict[str, Callable[[], Strategy]] = {
    "top-k of tensors": lambda: TopKStrategy(ADAMW, H=3, topk=8, chunk=64, chunks_of="tensor"),
    "top-k, members": lambda: TopKStrategy(ADAMW, H=3, topk=8, chunk=64, mean_over="members"),
    "DeMo, members": lambda: DeMoStrategy(
        compression_topk=4, compression_chunk=16, mean_over="members"
    ),
    "FedAvg, samples": lambda: FedAvgStrategy(ADAMW, H=3, weighting="samples"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READINGS)
def test_what_authors_and_papers_say_otherwise_is_equal_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, name, READINGS[name])
    pair = compare(name, steps=9, nodes=3, method="fork")
    assert pair.equal, f"they part at step {pair.first_difference}"
    assert pair.real.rounds == pair.simulated.rounds


def test_without_an_order_the_bits_part() -> None:
    pair = _pair("all-reduce", False)
    assert pair.first_difference == 0 and not pair.equal
    assert pair.real.final_loss == pytest.approx(pair.simulated.final_loss, rel=1e-3)


def test_models_are_equal_in_the_end() -> None:
    pair = _pair("DiLoCo", True)
    for real, simulated in zip(pair.real.models, pair.simulated.models, strict=True):
        theirs = simulated.state_dict()
        assert all(value.equal(theirs[name]) for name, value in real.state_dict().items())


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "10", "--nodes", "2", "--strategy", "LocalSGD"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["strategy", "synchr.", "equal"]
    assert line.split()[:4] == ["LocalSGD", "1", "yes", "-"]


def test_the_command_kills_a_node_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "30", "--nodes", "2", "--strategy", "DiLoCo"]) == 0
    _, whole, killed = capsys.readouterr().out.splitlines()
    assert whole.split()[:4] == ["DiLoCo", "3", "yes", "-"]
    assert whole.split()[5] == "yes", "through the server too"
    assert killed.split()[:5] == ["DiLoCo,", "killed", "2", "yes", "-"]


def test_a_difference_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torchft.verify.digests.compare", lambda *_, **__: _pair("all-reduce", False)
    )
    assert main(["--strategy", "all-reduce"]) == 1


@pytest.mark.slow
def test_twelve_processes_are_equal_too() -> None:
    pair = compare("Streaming DiLoCo", steps=60, nodes=12, method="fork")
    assert pair.equal and pair.synchronisations == 15
