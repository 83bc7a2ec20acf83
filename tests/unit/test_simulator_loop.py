"""Whole runs of stacked nodes."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from helpers.peers import Script
from helpers.reference import INNER, OUTER, reference
from helpers.tiny import Tiny
from helpers.training import ROWS, STEPS, Row
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Discards, Event, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import Simulation, run_stacked
from torchft.simulator.node import NodeError, TrainNode
from torchft.simulator.result import Result, mean_model
from torchft.strategies import (
    AllReduceRecipe,
    DiLoCoRecipe,
    DiLoCoStrategy,
    Inner,
    LocalSGDRecipe,
    OptimSpec,
    Recipe,
    ScheduleSpec,
    Strategy,
)


class Learns(nn.Module):
    """`Tiny` on a batch of one sample, which holds what `helpers.tiny.backward` draws."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.tiny(x[0]) - y[0]) ** 2).mean()


def drawn(rank: int, num_nodes: int, train: bool) -> list[tuple[Tensor, Tensor]]:
    """The batches of one node, step by step."""
    generators = [torch.Generator().manual_seed(1000 * rank + s) for s in range(1, STEPS + 1)]
    return [(torch.randn(4, 5, generator=g), torch.randn(4, 3, generator=g)) for g in generators]


def drawn_more(rank: int, num_nodes: int, train: bool) -> list[tuple[Tensor, Tensor]]:
    """The same, of n + 1 times as many samples at node n."""
    return drawn(rank, num_nodes, train) * (rank + 1)


def experiment(*recipes: Recipe, **settings: Any) -> Experiment:
    bucket_bytes = settings.pop("bucket_bytes", None)
    inner = Inner(OptimSpec(torch.optim.AdamW, **INNER.keywords))
    defaults = {
        "model": Learns(),
        "train_dataset": drawn,
        "strategy": Strategy(recipes, inner=inner, bucket_bytes=bucket_bytes),
        "num_nodes": 3,
        "max_steps": STEPS,
        "batch_size": 1,
        "shuffle": False,
        "device": "cpu",
    }
    return Experiment(**{**defaults, **settings})


def of_row(row: Row, nodes: int, events: list[Event]) -> Result:
    made = row.make(None)  # type: ignore[arg-type]
    recipes = made if isinstance(made, list) else [made]
    for recipe in recipes:
        recipe.check_inner = lambda optim: None  # the reference steps signs by AdamW too
    return run_stacked(
        experiment(
            *recipes,
            train_dataset=drawn_more if row.kind.weighed else drawn,
            num_nodes=nodes,
            events=events,
            bucket_bytes=row.bucket_bytes,
        )
    )


# Optimizers over the model's own parameters are for real processes, and so are its own fragments.
STACKED = {
    name: row
    for name, row in ROWS.items()
    if (row.kind.fragments == 1 or row.kind.cut)
    and row.kind.codec is None
    and "the model's outer" not in name
    and not row.kind.delay
}
"""Rows with a codec round by blocks of a layout that includes what the reference leaves out; they
are compared to the bit with real processes instead."""
every_row = pytest.mark.parametrize("name", STACKED)


@cache
def steps_of_round(name: str, nodes: int = 3) -> dict[int, tuple[int, int]]:
    """Round number, from 1 → inner steps, from 0, in which it opens and closes."""
    rounds = of_row(STACKED[name], nodes, []).rounds
    return {number: (r.step - r.delay, r.step) for number, r in enumerate(rounds, start=1)}


def assert_right(name: str, script: Script) -> Result:
    """The numbers are the reference's."""
    steps = steps_of_round(name, script.nodes)
    events: list[Event] = [Discards(steps[number][1]) for number in script.no]
    events += [Dies(n, steps[number][0], in_round=True) for n, number in script.lost.items()]
    events += [Joins(n, steps[number][0]) for n, number in script.joins.items()]
    result = of_row(STACKED[name], script.nodes, events)
    expected = reference(STACKED[name].kind, script, STEPS)
    assert result.alive == sorted(expected)
    for node, weights in expected.items():
        assert_close(used(result.models[node], None), used(Learns(), weights), rtol=0, atol=5e-6)
    return result


def used(model: nn.Module, weights: list[Tensor] | None) -> dict[str, Tensor]:
    """By name, but for the parameter that nobody uses: its zero gradient is one here, so weight
    decay shrinks it, where the reference's optimizer passes over it."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    named = zip(trained, trained.values() if weights is None else weights, strict=True)
    return {name: values for name, values in named if not name.endswith("unused")}


class TestNumbers:
    """Of every strategy, against a plain reference."""

    @every_row
    @pytest.mark.parametrize("nodes", [1, 3])
    def test_nothing_happens(self, name: str, nodes: int) -> None:
        result = assert_right(name, Script(nodes))
        assert [row.step for row in result.history] == list(range(STEPS))
        assert all(row.losses.keys() == set(range(nodes)) for row in result.history)

    # Of SPARTA-DiLoCo two rounds close in one step, and the script would discard only one.
    @pytest.mark.parametrize("name", sorted(STACKED.keys() - {"SPARTA-DiLoCo"}))
    def test_a_round_is_discarded(self, name: str) -> None:
        assert_right(name, Script(3, no={2, 3}))

    @every_row
    def test_a_node_is_lost_in_a_round(self, name: str) -> None:
        result = assert_right(name, Script(3, lost={1: 2}))
        assert [r.committed for r in result.rounds[:3]] == [True, False, True]

    @every_row
    def test_a_node_is_lost_and_comes_back(self, name: str) -> None:
        result = assert_right(name, Script(3, lost={1: 2}, joins={1: 4}))
        (heal,) = result.heals
        assert (heal.node, heal.donor) == (1, 0)
        away = range(steps_of_round(name)[2][0] + 1, heal.step)
        assert all(1 not in result.history[step].losses for step in away)

    @every_row
    def test_the_first_node_is_lost_and_another_joins(self, name: str) -> None:
        assert_right(name, Script(3, lost={0: 4}, joins={2: 2}))


def random_data(samples: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, generator=generator)
    return x, x[:, :3] * 2


class Dropping(nn.Module):
    """Dropout, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.tiny, self.drop = nn.BatchNorm1d(5), Tiny(), nn.Dropout(0.2)
        self.calls = 0

    def forward(self, batch: Any) -> Tensor:
        self.calls += 1
        return ((self.drop(self.tiny(self.norm(batch[0]))) - batch[1]) ** 2).mean()


def dropping(recipe: Recipe | None = None, **settings: Any) -> Experiment:
    defaults = {"model": Dropping(), "train_dataset": random_data(), "shuffle": True}
    defaults |= {"batch_size": 5, "max_steps": 12, "digests": True}
    return experiment(recipe or DiLoCoRecipe(OUTER, 4), **{**defaults, **settings})


class TestRepeating:
    def test_the_same_experiment_gives_the_same_bits(self) -> None:
        one, other = run_stacked(dropping()), run_stacked(dropping())
        assert one.digests == other.digests
        assert one.history == other.history
        assert run_stacked(dropping(seed=43)).history != one.history

    def test_every_node_and_step_draws_its_own(self) -> None:
        noise = run_stacked(experiment(LocalSGDRecipe(100), model=Noise(), max_steps=4))
        losses = [loss for row in noise.history for loss in row.losses.values()]
        assert len(set(losses)) == len(losses) == 12

    def test_a_model_left_in_evaluation_mode_is_trained(self) -> None:
        trained = run_stacked(dropping())
        left = dropping()
        left.model.eval()
        assert run_stacked(left).history == trained.history
        assert not left.model.training

    def test_only_steps_count_as_steps_also_after_resuming(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [0.0]
        monkeypatch.setattr("torchft.simulator.loop.perf_counter", lambda: clock[0])
        saved: list[dict[str, Any]] = []

        class Timed(TrainNode):
            def loss(self, batch: Any) -> Tensor:
                clock[0] += 1.0
                return super().loss(batch)

        def look(run: Simulation) -> None:
            clock[0] += 100.0
            if run.step == 2:
                saved.append(copy.deepcopy(run.state_dict()))

        whole = run_stacked(dropping(node_cls=Timed, max_steps=4), on_step=look)
        assert whole.seconds["steps"] == 4 * whole.num_nodes
        assert whole.seconds["train"] == 5 * 100 + 4 * whole.num_nodes
        resumed = run_stacked(dropping(node_cls=Timed, max_steps=4), resume=saved[0])
        assert resumed.seconds["steps"] == whole.seconds["steps"]

    def test_the_callers_random_numbers_and_model_are_untouched(self) -> None:
        one = dropping()
        before = copy.deepcopy(one.model.state_dict())
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        run_stacked(one)
        assert torch.equal(torch.rand(2), expected)
        assert_close(one.model.state_dict(), before, rtol=0, atol=0)
        assert one.model.calls == 0

    def test_a_factory_is_seeded_and_asked_once(self) -> None:
        made: list[nn.Module] = []

        def make() -> nn.Module:
            made.append(nn.Sequential(nn.Linear(5, 3)))
            return Fits(made[-1])

        run_stacked(dropping(model=make, max_steps=1))
        run_stacked(dropping(model=make, max_steps=1))
        first, second = made
        assert torch.equal(first[0].weight, second[0].weight)

    @pytest.mark.parametrize("recipe", [lambda: DiLoCoRecipe(OUTER, 4), AllReduceRecipe])
    def test_it_goes_on_from_what_was_saved(self, recipe: Any) -> None:
        events = [Dies(1, 3), Joins(1, 7), Dies(2, 9, in_round=True)]
        saved: dict[str, Any] = {}

        def save(run: Simulation) -> None:
            if run.step == 5:
                saved.update(copy.deepcopy(run.state_dict()))

        whole = run_stacked(dropping(recipe(), events=events), on_step=save)
        seen: list[int] = []
        resumed = run_stacked(
            dropping(recipe(), events=events),
            on_step=lambda run: seen.append(run.step),
            resume=saved,
        )
        assert seen == list(range(5, 13))
        assert resumed.digests == whole.digests
        assert resumed.history == whole.history
        assert resumed.rounds == whole.rounds
        assert resumed.heals == whole.heals


class Noise(Learns):
    """Its loss is what it draws."""

    def forward(self, batch: Any) -> Tensor:
        return 0 * super().forward(batch) + torch.rand(())


class Fits(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, batch: Any) -> Tensor:
        return ((self.inside(batch[0]) - batch[1]) ** 2).mean()


class TestRoundsInFlight:
    """They open, and training goes on before they close."""

    def test_they_send_what_rounds_without_a_delay_send(self) -> None:
        late, plain = (
            run_stacked(dropping(DiLoCoRecipe(OUTER, 6, fragments=2, delay=delay)))
            for delay in (2, 0)
        )
        opened = [(r.step - r.delay, r.step) for r in late.rounds]
        assert opened == [(0, 2), (3, 5), (6, 8), (9, 11)]
        assert [(r.step, r.delay) for r in plain.rounds] == [(2, 0), (5, 0), (8, 0), (11, 0)]
        assert late.bytes_sent == plain.bytes_sent

    def test_the_last_one_closes_before_anybody_looks_at_the_end(self) -> None:
        seen: list[tuple[int, bool]] = []
        result = run_stacked(
            dropping(DiLoCoRecipe(OUTER, 6, delay=3), max_steps=11),
            on_step=lambda run: seen.append((len(run.result.rounds), run.strategy.in_flight)),
        )
        assert seen[2:6] == [(0, False), (0, True), (0, True), (0, True)]
        assert seen[-2:] == [(1, True), (2, False)]
        # It opened after the ninth step.
        assert [(r.step, r.delay) for r in result.rounds] == [(5, 3), (10, 2)]
        step, digests = result.digests[-1]
        assert (step, len(set(digests))) == (10, 1)

    def test_what_a_member_sent_before_it_died_is_in_it(self) -> None:
        recipe = DiLoCoRecipe(OUTER, 6, delay=3)
        result = run_stacked(dropping(recipe, events=[Dies(1, 4)], max_steps=6))
        (record,) = result.rounds
        assert (record.counted, record.committed) == ((0, 1, 2), True)

    def test_one_that_is_still_open_when_the_next_opens_without_a_member_fails(self) -> None:
        recipe = DiLoCoRecipe(OUTER, 4, fragments=2, delay=3)
        result = run_stacked(dropping(recipe, events=[Dies(1, 4)]))
        found = [(r.step - r.delay, r.step, len(r.members), r.committed) for r in result.rounds]
        assert found[:3] == [(0, 3, 3, True), (2, 5, 3, False), (4, 7, 2, True)]


class TestResult:
    def test_it_counts_what_each_node_sent(self) -> None:
        result = run_stacked(dropping(events=[Dies(2, 6)], max_steps=12))
        elements = sum(p.numel() for p in result.models[0].parameters() if p.requires_grad)
        ring = [elements * 4 * 2 * (n - 1) // n for n in (3, 2, 2)]
        assert result.bytes_sent == [sum(ring), sum(ring), ring[0]]
        assert [r.step for r in result.rounds] == [3, 7, 11]

    def test_digests_are_equal_where_weights_are_shared(self) -> None:
        result = run_stacked(dropping(events=[Dies(2, 6)]))
        steps, digests = zip(*result.digests, strict=True)
        assert steps == (3, 7, 11)
        assert [len(set(of)) for of in digests] == [1, 2, 2]
        assert digests[1][2] is None

    def test_micro_batches_only_change_the_memory(self) -> None:
        plain = {"model": Fits(nn.Linear(5, 3))}
        whole, pieces = (
            run_stacked(dropping(**plain, micro_batch_size=size)) for size in (None, 2)
        )
        assert_close(whole.final_loss, pieces.final_loss)
        assert_close(whole.model.state_dict(), pieces.model.state_dict())

    def test_a_hook_sees_every_step(self) -> None:
        seen: list[tuple[int, int]] = []
        run_stacked(
            dropping(max_steps=3),
            on_step=lambda run: seen.append((run.step, len(run.result.history))),
        )
        assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]

    def test_the_rate_is_the_one_that_a_step_was_taken_with(self) -> None:
        inner = Inner(OptimSpec(lr=0.1), ScheduleSpec("lambda_cosine", warmup_steps=4))
        strategy = Strategy([LocalSGDRecipe(2)], inner=inner)
        rates = [row.lr for row in run_stacked(dropping(strategy=strategy, max_steps=6)).history]
        assert_close(rates, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


class TestMeanModel:
    def test_means_of_weights_and_statistics_but_not_of_counts(self) -> None:
        models = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
        models[0].weight.data.fill_(1.0)
        models[1].weight.data.fill_(2.0)
        models[1].running_mean.fill_(3.0)
        models[0].num_batches_tracked.fill_(7)
        mean = mean_model(models)
        assert mean.weight.tolist() == [1.5] * 3
        assert mean.running_mean.tolist() == [1.5] * 3
        assert int(mean.num_batches_tracked) == 7
        assert models[0].weight.tolist() == [1.0] * 3

    def test_of_equal_models_it_is_that_model(self) -> None:
        one = Tiny(3)
        mean = mean_model([copy.deepcopy(one) for _ in range(7)])
        assert all(
            torch.equal(a, b) for a, b in zip(mean.parameters(), one.parameters(), strict=True)
        )
        assert mean.second[0].weight is mean.first[2].weight


class TestSilence:
    def test_nodes_that_never_talked_are_warned_of(self) -> None:
        message = "DiLoCoStrategy.* opened no round in 6 steps, so the 3 nodes trained each for"
        with pytest.warns(UserWarning, match=message):
            run_stacked(experiment(strategy=DiLoCoStrategy(), max_steps=6))

    @pytest.mark.parametrize("nodes", [1, 3])
    def test_one_node_or_one_round_is_no_reason(self, nodes: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_stacked(
                experiment(
                    strategy=DiLoCoStrategy(H=6 if nodes > 1 else 100), max_steps=6, num_nodes=nodes
                )
            )


class TestGoingWrong:
    def test_a_loss_that_is_no_number_names_node_and_step(self) -> None:
        class Breaks(Learns):
            def forward(self, batch: Any) -> Tensor:
                loss = super().forward(batch[:2])
                return loss * float("nan") if batch[2].item() == 4 else loss

        def data(rank: int, num_nodes: int, train: bool) -> list[Any]:
            return [(*b, s if rank == 1 else -1) for s, b in enumerate(drawn(rank, 3, train))]

        with pytest.raises(NodeError, match="node 1 in step 5 is nan"):
            run_stacked(experiment(DiLoCoRecipe(OUTER, 4), model=Breaks(), train_dataset=data))

    def test_a_model_without_a_scalar_ends_before_any_step(self) -> None:
        strategy = Strategy([AllReduceRecipe()], inner=Inner())
        with pytest.raises(
            SettingsError, match=r"node 0's model returned a tensor of shape \(5, 3\)"
        ):
            run_stacked(dropping(model=OnlyFirst(), strategy=strategy))
        assert strategy.clock.steps == 0

    def test_a_strategy_serves_once(self) -> None:
        strategy = Strategy([DiLoCoRecipe(OUTER, 4)], inner=Inner())
        run_stacked(dropping(strategy=strategy, max_steps=1))
        with pytest.raises(SettingsError, match="make one for each run"):
            run_stacked(dropping(strategy=strategy))

    @pytest.mark.parametrize("by", ["data", "no_grad"])
    def test_a_model_that_updates_what_all_nodes_share_is_refused(self, by: str) -> None:
        class Teacher(Learns):
            def __init__(self) -> None:
                super().__init__()
                self.base = nn.Parameter(torch.ones(999), requires_grad=False)
                self.calls = 0

            def forward(self, batch: Any) -> Tensor:
                self.calls += 1
                with torch.no_grad():
                    if by == "data":
                        self.base.data.mul_(0.9)
                    elif self.calls == 6:  # long after the first steps
                        self.base.mul_(0.9)
                return super().forward(batch)

        step = {"data": 1, "no_grad": 6}[by]
        with pytest.raises(SettingsError, match=f"base, .* by step {step}, .*register_buffer"):
            run_stacked(experiment(DiLoCoRecipe(OUTER, 4), model=Teacher()))


class OnlyFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.line(batch[0])
