"""Every recipe passes the same battery; a new one is a row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from helpers.reference import INNER, OUTER, Kind, reference
from helpers.tiny import Tiny, backward, digest
from torch import Tensor
from torch.testing import assert_close

from torchft.errors import PhaseError, SettingsError
from torchft.peers import Place
from torchft.strategies import AllReduce, DiLoCo, LocalSGD, ModelLocal, Recipe, Strategy
from torchft.strategies.parts.outer import ModelOuter


@dataclass(frozen=True)
class Row:
    """A recipe, and what it must compute."""

    kind: Kind
    make: Callable[[ModelLocal], Recipe]
    bucket_bytes: int | None = None


def with_model_outer(**options: Any) -> Callable[[ModelLocal], Recipe]:
    def make(local: ModelLocal) -> Recipe:
        outer = ModelOuter(local, [OUTER(local.parameters)], keep_weights=options.get("mix", 0) > 0)
        return DiLoCo(outer, **options)

    return make


ROWS = {
    "all-reduce": Row(Kind("all_reduce"), lambda _: AllReduce()),
    "all-reduce in buckets": Row(Kind("all_reduce"), lambda _: AllReduce(), bucket_bytes=60),
    "LocalSGD": Row(Kind("local_sgd", every=3), lambda _: LocalSGD(3)),
    "LocalSGD without backup": Row(
        Kind("local_sgd", every=3, backup=False), lambda _: LocalSGD(3, backup=False)
    ),
    "DiLoCo": Row(Kind("diloco", every=4), lambda _: DiLoCo(OUTER, 4)),
    "DiLoCo, the model's outer": Row(Kind("diloco", every=4), with_model_outer(every=4)),
    "DiLoCo in buckets": Row(Kind("diloco", every=4), lambda _: DiLoCo(OUTER, 4), bucket_bytes=36),
    "DiLoCo, 2 fragments": Row(
        Kind("diloco", every=4, fragments=2), lambda _: DiLoCo(OUTER, 4, fragments=2)
    ),
    "DiLoCo, 2 fragments, the model's outer": Row(
        Kind("diloco", every=4, fragments=2), with_model_outer(every=4, fragments=2)
    ),
    "DiLoCo, mixed": Row(Kind("diloco", every=2, mix=0.25), lambda _: DiLoCo(OUTER, 2, mix=0.25)),
    "DiLoCo, 2 fragments, delayed, mixed": Row(
        Kind("diloco", every=6, fragments=2, delay=2, mix=0.5),
        with_model_outer(every=6, fragments=2, delay=2, mix=0.5),
    ),
}
STEPS = 24

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


class Training:
    """What one node runs."""

    def __init__(self, row: Row, node: Node, *, seed: int = 0) -> None:
        self.node, self.row = node, row
        self.model = Tiny(seed)
        fragments = [self.model.first, self.model.second]
        modules = fragments if row.kind.fragments == 2 else [self.model]
        self.inner = INNER([p for p in self.model.parameters() if p.requires_grad])
        self.local = ModelLocal(modules, self.inner)
        self.recipe = row.make(self.local)
        self.strategy = Strategy([self.recipe], bucket_bytes=row.bucket_bytes)
        self.strategy.bind(self.local, node)
        node.register(self.load, self.save)
        node.register(self.strategy.load_shared_state_dict, self.strategy.shared_state_dict)

    def save(self) -> Any:
        return {"model": self.model.state_dict(), "inner": self.inner.state_dict()}

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["inner"])

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.local.parameters]

    @property
    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.local.parameters]

    def everything(self) -> str:
        own = [recipe.own for recipe in self.strategy.recipes]
        return digest([self.save(), self.strategy.shared_state_dict(), own, self.gradients])

    def backward(self) -> None:
        self.strategy.begin()
        self.inner.zero_grad()
        backward(self.model, self.node.rank, self.strategy.clock.steps + 1)
        for opened in self.node.open_rounds:
            opened.seen = self.node.watch() if self.node.watch else None

    def run(self, steps: int = STEPS) -> Training:
        if self.node.joins or self.node.script.opening:
            self.strategy.join()
        return self.go_on(steps)

    def go_on(self, steps: int) -> Training:
        while self.strategy.clock.steps < steps:
            self.backward()
            self.strategy.step()
        self.strategy.finish()
        return self


def train(row: Row, script: Script) -> dict[int, Training]:
    return World(script).run(lambda node: Training(row, node).run())


def assert_right(row: Row, script: Script) -> dict[int, Training]:
    """The numbers are the reference's, and what nodes share is equal to the bit."""
    results = train(row, script)
    expected = reference(row.kind, script, STEPS)
    assert results.keys() == expected.keys()
    for node, weights in expected.items():
        assert_close(results[node].weights, weights, rtol=0, atol=2e-6)
    assert len({digest(r.strategy.shared_state_dict()) for r in results.values()}) == 1
    return results


@every_row
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_numbers_equal_a_plain_reference(row: Row, nodes: int) -> None:
    assert_right(row, Script(nodes))


@every_row
def test_discarded_rounds_leave_what_the_reference_says(row: Row) -> None:
    assert_right(row, Script(3, no={2, 3}))


@every_row
def test_a_lost_member_discards_its_round_and_the_others_go_on(row: Row) -> None:
    assert_right(row, Script(3, lost={1: 2}))


@every_row
def test_a_joining_node_heals_and_contributes_nothing_of_its_own(row: Row) -> None:
    assert_right(row, Script(3, joins={2: 3}))


@every_row
def test_a_node_is_lost_and_comes_back(row: Row) -> None:
    assert_right(row, Script(3, lost={1: 2}, joins={1: 4}))


@every_row
def test_the_round_that_heals_a_node_is_discarded_and_the_heal_stands(row: Row) -> None:
    assert_right(row, Script(3, joins={2: 3}, no={3}))


@every_row
def test_a_node_that_cannot_heal_spoils_nothing_and_heals_in_the_next_round(row: Row) -> None:
    if row.kind.name == "all_reduce":
        pytest.skip("a manager's matter: gradients are not sent by whoever could not heal")
    script = Script(3, joins={2: 2}, unhealed={2: 2})
    # Fragments differ in size: nobody gets an average when a member does not know which is sent.
    expected = Script(3, joins={2: 2}, unhealed={2: 2}, no={2} if row.kind.fragments > 1 else ())
    results = train(row, script)
    for node, weights in reference(row.kind, expected, STEPS).items():
        assert_close(results[node].weights, weights, rtol=0, atol=2e-6)
    assert len({digest(r.strategy.shared_state_dict()) for r in results.values()}) == 1


@every_row
def test_an_opening_round_gives_all_the_first_ones_weights(row: Row) -> None:
    if row.kind.name == "all_reduce":
        pytest.skip("gradients need no opening round: the first round heals before the forward")
    world = World(Script(3, opening=True))
    results = world.run(lambda node: Training(row, node, seed=node.rank).run())
    expected = reference(row.kind, Script(3), STEPS)
    for node, weights in expected.items():
        assert_close(results[node].weights, weights, rtol=0, atol=2e-6)


@every_row
def test_nothing_is_written_before_the_round_closes(row: Row) -> None:
    if row.kind.delay:
        pytest.skip("inner steps are taken between its opening and its close, on purpose")

    def watched(node: Node) -> int:
        training, looks = Training(row, node), []
        node.watch = lambda: looks.append(1) or training.everything()
        training.run()
        return len(looks)

    looks = World(Script(2, no={2})).run(watched)
    assert all(count >= STEPS / row.kind.every for count in looks.values())


@every_row
def test_state_saved_in_mid_cycle_continues_to_the_same_numbers(row: Row) -> None:
    if row.kind.delay:
        pytest.skip("a round in flight is not part of the state")

    def resumed(node: Node) -> Training:
        first = Training(row, node).run(STEPS // 2 + 1)
        saved = copy.deepcopy([first.save(), first.strategy.state_dict()])
        second = Training(row, node, seed=9)
        second.load(saved[0])
        second.strategy.load_state_dict(saved[1])
        return second.run()

    expected = reference(row.kind, Script(2), STEPS)
    for node, training in World(Script(2)).run(resumed).items():
        assert_close(training.weights, expected[node], rtol=0, atol=2e-6)


class TestWhatANoLeavesBehind:
    """The design's table, row by row."""

    def after_a_no(self, row: Row, steps: int) -> tuple[Training, dict[str, Any]]:
        """One node, whose first round is voted down; and what there was when it opened."""
        training: list[Training] = []
        before: dict[str, Any] = {}

        def story(node: Node) -> None:
            one = Training(row, node)
            training.append(one)
            for _ in range(steps - 1):
                one.backward()
                one.strategy.step()
            before["start"] = one.weights
            one.backward()
            if one.recipe.place is Place.AFTER:
                assert one.strategy.before()
                one.local.inner_step()
                before.update(self.parts(one))
                one.strategy.after()
            else:
                before.update(self.parts(one))
                before["went"] = one.strategy.step()

        World(Script(1, no={1})).run(story)
        return training[0], before

    def parts(self, one: Training) -> dict[str, Any]:
        state = one.strategy.shared_state_dict()
        del state["steps"]
        return {
            "weights": one.weights,
            "inner": digest(one.inner.state_dict()),
            "shared": self.without_clock(state),
        }

    def without_clock(self, state: Any) -> str:
        kept = copy.deepcopy(state)
        for recipe in kept["recipes"]:
            for part in (recipe, *recipe.values()):
                if isinstance(part, dict):
                    part.pop("inner_steps", None)
        return digest(kept)

    def test_all_reduce_skips_the_step(self) -> None:
        one, before = self.after_a_no(ROWS["all-reduce"], 1)
        assert before["went"] is False
        assert_close(one.weights, before["start"], rtol=0, atol=0)
        assert self.parts(one)["inner"] == before["inner"]

    def test_local_sgd_restores_the_last_average(self) -> None:
        one, before = self.after_a_no(ROWS["LocalSGD"], 3)
        assert_close(one.weights, [p for p in Tiny().parameters() if p.requires_grad])
        assert self.parts(one)["inner"] == before["inner"]
        assert self.parts(one)["shared"] == before["shared"]

    def test_local_sgd_without_backup_lets_the_weights_stand(self) -> None:
        one, before = self.after_a_no(ROWS["LocalSGD without backup"], 3)
        assert_close(one.weights, before["weights"], rtol=0, atol=0)
        assert self.parts(one)["inner"] == before["inner"]

    @pytest.mark.parametrize("name", ["DiLoCo", "DiLoCo, the model's outer"])
    def test_diloco_restores_the_backup_and_leaves_the_outer_optimizer(self, name: str) -> None:
        one, before = self.after_a_no(ROWS[name], 4)
        assert_close(one.weights, [p for p in Tiny().parameters() if p.requires_grad])
        assert self.parts(one)["inner"] == before["inner"]
        assert self.parts(one)["shared"] == before["shared"]

    def test_a_fragment_is_restored_and_the_others_stand(self) -> None:
        one, before = self.after_a_no(ROWS["DiLoCo, 2 fragments"], 2)
        first, second = (f.parameters for f in one.recipe.fragments)  # type: ignore[attr-defined]
        start = [p.detach() for p in Tiny().parameters() if p.requires_grad]
        assert_close([one.weights[i] for i in first], [start[i] for i in first])
        assert_close([one.weights[i] for i in second], [before["weights"][i] for i in second])
        assert self.parts(one)["inner"] == before["inner"]
        assert self.parts(one)["shared"] == before["shared"]

    def test_the_fragment_that_failed_is_tried_again(self) -> None:
        one, _ = self.after_a_no(ROWS["DiLoCo, 2 fragments"], 2)
        assert one.recipe.fragment().index == 0


class TestErrorsInARound:
    """Whatever raises, the parameters are those of the last synchronisation afterwards."""

    def run(self, break_it: Callable[[Training], None], name: str) -> Training:
        def story(node: Node) -> Training:
            one = Training(ROWS[name], node)
            break_it(one)
            for _ in range(3):
                one.backward()
                one.strategy.step()
            one.backward()
            with pytest.raises(RuntimeError, match="broken"):
                one.strategy.step()
            return one

        return World(Script(1)).run(story)[0]

    def assert_as_at_the_start(self, one: Training) -> None:
        start = [p.detach() for p in Tiny().parameters() if p.requires_grad]
        assert_close(one.weights, start, rtol=0, atol=0)
        state = one.recipe.state_dict()["0"]
        views = state["original_parameters"]
        names = dict(Tiny().named_parameters())
        assert_close(views, {n: names[n].detach() for n in views})
        assert state["committed_rounds"] == 0

    def test_the_quorum_fails(self) -> None:
        def no_quorum(one: Training) -> None:
            def broken(place: Place) -> Any:
                raise RuntimeError("broken quorum")

            one.node.open = broken  # type: ignore[method-assign]

        self.assert_as_at_the_start(self.run(no_quorum, "DiLoCo"))

    def test_the_contribution_fails_and_frees_the_others(self) -> None:
        def no_delta(one: Training) -> None:
            def broken(*_: Any) -> Any:
                raise RuntimeError("broken, out of memory")

            one.local.delta = broken  # type: ignore[method-assign]

        one = self.run(no_delta, "DiLoCo")
        self.assert_as_at_the_start(one)
        assert one.node.world.given_up == {1}
        assert one.node.open_rounds == []

    def test_the_outer_optimizer_raises_halfway(self) -> None:
        def halfway(one: Training) -> None:
            outer = one.recipe.outer._optimizers[0]  # type: ignore[attr-defined]

            def broken() -> None:
                with torch.no_grad():
                    one.local.parameters[0].add_(1.0)
                raise RuntimeError("broken outer step")

            outer.step = broken

        one = self.run(halfway, "DiLoCo, the model's outer")
        self.assert_as_at_the_start(one)
        assert one.recipe.state_dict()["0"]["outer_optimizer"]["state"] == {}

    def test_the_local_gradients_come_back_after_an_outer_step(self) -> None:
        def story(node: Node) -> None:
            one = Training(ROWS["DiLoCo, the model's outer"], node)
            for _ in range(4):
                one.backward()
                mine = one.gradients
                one.strategy.step()
            assert [g is None for g in mine] == [g is None for g in one.gradients]
            assert_close(
                [g for g in one.gradients if g is not None], [g for g in mine if g is not None]
            )

        World(Script(1)).run(story)


def test_a_healed_node_starts_from_the_global_weights_not_from_the_donors() -> None:
    """Its next delta must not repeat the donor's."""
    seen: dict[str, Any] = {}

    def story(node: Node) -> None:
        one = Training(ROWS["DiLoCo, 2 fragments"], node)
        if node.joins:
            healed = node.open

            def look(place: Place) -> Any:
                opened = healed(place)
                seen["donor's"] = one.weights
                return opened

            node.open = look  # type: ignore[method-assign]
            one.strategy.join()
            node.open = healed  # type: ignore[method-assign]
            second = one.recipe.fragments[1].parameters  # type: ignore[attr-defined]
            seen["second"] = second
            seen["healed"] = one.weights
            seen["global"] = copy.deepcopy(one.recipe.state_dict()["1"]["original_parameters"])
        one.go_on(4)

    World(Script(2, joins={1: 1})).run(story)
    assert_close([seen["healed"][i] for i in seen["second"]], list(seen["global"].values()))
    assert any(not torch.equal(seen["healed"][i], seen["donor's"][i]) for i in seen["second"])


def test_gradients_without_begin_are_refused() -> None:
    def story(node: Node) -> None:
        one = Training(ROWS["all-reduce"], node)
        with pytest.raises(PhaseError, match="begin"):
            one.strategy.step()

    World(Script(1)).run(story)


def test_a_recipe_serves_one_strategy() -> None:
    local, recipe = ModelLocal([Tiny()]), LocalSGD(2)
    node = Node(World(Script(1)), 0, 1)
    strategy = Strategy([recipe]).bind(local, node)
    with pytest.raises(SettingsError, match="in use"):
        Strategy([recipe]).bind(local, node)
    with pytest.raises(SettingsError, match="in use"):
        strategy.bind(local, node)
