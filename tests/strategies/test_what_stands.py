"""What a discarded round, an error and a heal leave behind, strategy by strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from helpers.tiny import Tiny, digest
from helpers.training import ROWS, Row, Training
from torch import Tensor
from torch.testing import assert_close

from torchft.errors import PhaseError, SettingsError
from torchft.peers import Place
from torchft.strategies import LocalSGDRecipe, ModelLocal, Strategy


def start() -> list[Tensor]:
    """The weights that all begin with."""
    return [p.detach() for p in Tiny().parameters() if p.requires_grad]


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
            "own": digest([recipe.own for recipe in one.strategy.recipes]),
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

    @pytest.mark.parametrize(("name", "steps"), [("SPARTA", 2), ("FedAvg in islands", 3)])
    def test_what_is_each_nodes_own_stands(self, name: str, steps: int) -> None:
        one, before = self.after_a_no(ROWS[name], steps)
        assert_close(one.weights, before["weights"], rtol=0, atol=0)
        assert self.parts(one)["inner"] == before["inner"]

    def test_demo_skips_the_step_and_its_momentum_stands(self) -> None:
        one, before = self.after_a_no(ROWS["DeMo"], 1)
        assert before["went"] is False
        assert_close(one.weights, before["start"], rtol=0, atol=0)
        assert self.parts(one)["inner"] == before["inner"]
        assert self.parts(one)["own"] == before["own"]

    def test_top_k_leaves_weights_residual_and_backup(self) -> None:
        one, before = self.after_a_no(ROWS["top-k"], 3)
        assert_close(one.weights, before["weights"], rtol=0, atol=0)
        assert any(not torch.equal(a, b) for a, b in zip(one.weights, start(), strict=True))
        for part in ("inner", "own", "shared"):
            assert self.parts(one)[part] == before[part]

    @pytest.mark.parametrize("name", ["DiLoCo", "DiLoCo, the model's outer"])
    def test_diloco_restores_the_backup_and_leaves_the_outer_optimizer(self, name: str) -> None:
        one, before = self.after_a_no(ROWS[name], 4)
        assert_close(one.weights, [p for p in Tiny().parameters() if p.requires_grad])
        assert self.parts(one)["inner"] == before["inner"]
        assert self.parts(one)["shared"] == before["shared"]

    def test_diloco_restores_the_inner_state_too_when_asked(self) -> None:
        one, _ = self.after_a_no(ROWS["DiLoCo, the inner state restored too"], 4)
        assert_close(one.weights, start(), rtol=0, atol=0)
        assert all(not state for state in one.inner.state.values())

    @pytest.mark.parametrize(
        ("name", "steps"),
        [("DiLoCo, int4, error feedback", 4), ("all-reduce, int8, error feedback", 1)],
    )
    def test_what_a_codec_has_left_over_stands(self, name: str, steps: int) -> None:
        def story(node: Node) -> None:
            one = Training(ROWS[name], node).go_on(steps)
            (own,) = one.recipe.own.values()
            kept = own[0].clone()
            assert kept.any()
            one.go_on(2 * steps)  # voted down
            assert torch.equal(own[0], kept)
            one.go_on(3 * steps)
            assert not torch.equal(own[0], kept)

        World(Script(1, no={2})).run(story)

    def test_a_fragment_is_restored_and_the_others_stand(self) -> None:
        one, before = self.after_a_no(ROWS["DiLoCo, 2 fragments"], 2)
        first, second = (f.parameters for f in one.recipe.fragments)  # type: ignore[attr-defined]
        begun = start()
        assert_close([one.weights[i] for i in first], [begun[i] for i in first])
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
        assert_close(one.weights, start(), rtol=0, atol=0)
        state = one.recipe.state_dict()["0"]
        views = state["original_parameters"]
        names = dict(Tiny().named_parameters())
        assert_close(views, {n: names[n].detach() for n in views})
        assert state["version"] == 0

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
            # The inner step has made the one that was missing, of a parameter nobody used.
            was = [
                torch.zeros_like(w) if g is None else g
                for g, w in zip(mine, one.weights, strict=True)
            ]
            assert_close(one.gradients, was)

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


@pytest.mark.parametrize("name", ["DeMo", "top-k", "DiLoCo, int4, error feedback"])
def test_a_group_that_heals_forgets_what_was_its_own_and_a_checkpoint_brings_it_back(
    name: str,
) -> None:
    def story(node: Node) -> None:
        one = Training(ROWS[name], node).go_on(5)
        (own,) = one.recipe.own.values()
        kept = [tensor.clone() for tensor in own]
        saved = copy.deepcopy(one.strategy.state_dict())
        assert any(tensor.any() for tensor in own)
        one.strategy.load_shared_state_dict(copy.deepcopy(one.strategy.shared_state_dict()))
        assert not any(tensor.any() for tensor in own)
        one.strategy.load_state_dict(saved)
        assert_close(own, kept, rtol=0, atol=0)

    World(Script(1)).run(story)


def test_gradients_without_begin_are_refused() -> None:
    def story(node: Node) -> None:
        one = Training(ROWS["all-reduce"], node)
        with pytest.raises(PhaseError, match="begin"):
            one.strategy.step()

    World(Script(1)).run(story)


def test_a_recipe_serves_one_strategy() -> None:
    local, recipe = ModelLocal([Tiny()]), LocalSGDRecipe(2)
    node = Node(World(Script(1)), 0, 1)
    strategy = Strategy([recipe]).bind(local, node)
    with pytest.raises(SettingsError, match="in use"):
        Strategy([recipe]).bind(local, node)
    with pytest.raises(SettingsError, match="in use"):
        strategy.bind(local, node)
