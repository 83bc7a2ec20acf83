"""Two recipes in one strategy: each has its own rounds and its own vote.

SPARTA every 2 steps and DiLoCo every 4 open these rounds:

    step      2   4      6   8      10  12
    SPARTA    1   2      4   5      7   8
    DiLoCo        3          6          9
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from helpers.reference import OUTER, reference
from helpers.tiny import digest
from helpers.training import ROWS, STEPS, Row, Training, every_third
from torch import Tensor
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.strategies import AllReduceRecipe, DiLoCoRecipe, LocalSGDRecipe, Recipe, SpartaRecipe

ROW = ROWS["SPARTA-DiLoCo"]


def assert_right(script: Script) -> dict[int, Training]:
    results = World(script).run(lambda node: Training(ROW, node).run())
    expected = reference(ROW.kind, script, STEPS)
    assert results.keys() == expected.keys()
    for node, weights in expected.items():
        assert_close(results[node].weights, weights, rtol=0, atol=2e-6)
    assert len({digest(r.strategy.shared_state_dict()) for r in results.values()}) == 1
    return results


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6], ids=lambda n: f"round {n}")
class TestAtEachRound:
    """SPARTA alone, SPARTA where both are due, DiLoCo where both are due."""

    def test_a_node_joins(self, number: int) -> None:
        assert_right(Script(3, joins={2: number}))

    def test_a_node_joins_in_a_round_that_is_voted_down(self, number: int) -> None:
        assert_right(Script(3, joins={2: number}, no={number}))

    def test_a_node_is_lost(self, number: int) -> None:
        assert_right(Script(3, lost={0: number}))

    def test_a_node_is_lost_and_another_joins_in_the_next_round(self, number: int) -> None:
        assert_right(Script(4, lost={1: number}, joins={3: number + 1}))

    def test_the_round_is_voted_down_and_the_other_recipe_goes_on(self, number: int) -> None:
        assert_right(Script(3, no={number}))

    def test_a_node_that_cannot_heal_spoils_this_round_only(self, number: int) -> None:
        script = Script(3, joins={2: number}, unhealed={2: number})
        seen = World(script).run(lambda node: Training(ROW, node).run())
        expected = reference(ROW.kind, Script(3, joins={2: number + 1}, no={number}), STEPS)
        for node, weights in expected.items():
            assert_close(seen[node].weights, weights, rtol=0, atol=2e-6)


def test_two_nodes_join_where_both_are_due_one_in_each_round() -> None:
    assert_right(Script(4, joins={2: 2, 3: 3}))


def test_a_no_of_one_leaves_what_the_other_did() -> None:
    """DiLoCo's goes back to its backup, SPARTA's leaves everything; the outer state tells."""
    seen: dict[int, list[Any]] = {}

    def story(node: Node) -> None:
        one = Training(ROW, node)
        states = seen.setdefault(node.rank, [])
        for _ in range(4):
            one.backward()
            one.strategy.step()
            states.append((one.weights, copy.deepcopy(one.strategy.recipes[1].state_dict())))

    World(Script(2, no={3})).run(story)
    weights, state = seen[0][3]
    start = list(state["0"]["original_parameters"].values())
    assert_close(weights, start, rtol=0, atol=0)
    assert state["0"]["version"] == 0


def test_nothing_is_written_before_either_round_closes() -> None:
    def watched(node: Node) -> int:
        training, looks = Training(ROW, node), []
        node.watch = lambda: looks.append(1) or training.everything()
        training.run()
        return len(looks)

    looks = World(Script(2, no={2, 3})).run(watched)
    assert all(count >= 2 * (STEPS // 2 + STEPS // 4) for count in looks.values())


def test_a_group_that_falls_behind_settles_in_for_both_recipes() -> None:
    """It heals when SPARTA's round opens; DiLoCo's weights are right from then on, not later."""
    seen: dict[str, Any] = {}

    def story(node: Node) -> None:
        one = Training(ROW, node)
        if node.rank == 1:
            original = node.open

            def behind(place: Any) -> Any:
                opened = original(place)
                if opened.number == 4:
                    donors = copy.deepcopy(one.strategy.shared_state_dict())
                    with torch.no_grad():
                        for p in one.local.parameters:
                            p.add_(1.0)
                    one.strategy.load_shared_state_dict(donors)
                return opened

            node.open = behind  # type: ignore[method-assign]
            send = one.recipe.contribution

            def look(fragment: Any) -> Any:
                if one.strategy.clock.steps == 6:
                    seen["sent from"] = one.weights
                    state = one.strategy.recipes[1].state_dict()["0"]
                    seen["backup"] = list(copy.deepcopy(state["original_parameters"]).values())
                return send(fragment)

            one.recipe.contribution = look  # type: ignore[method-assign]
        one.go_on(6)

    World(Script(2)).run(story)
    assert_close(seen["sent from"], seen["backup"], rtol=0, atol=0)


def test_a_node_that_cannot_heal_gives_up_the_round_whatever_it_takes_it_for() -> None:
    """It believes that DiLoCo's is open, where all tensors have always one size."""
    row = Row(ROW.kind, lambda _: [DiLoCoRecipe(OUTER, 4), SpartaRecipe(every_third, 2)])
    world = World(Script(3, joins={2: 1}, unhealed={2: 1}))
    results = world.run(lambda node: Training(row, node).run())
    assert world.given_up == {1}
    assert len({digest(r.strategy.shared_state_dict()) for r in results.values()}) == 1


def test_the_order_of_the_recipes_is_the_order_of_their_rounds() -> None:
    def opened(recipes: list[Recipe]) -> list[int]:
        def story(node: Node) -> list[int]:
            one = Training(Row(ROW.kind, lambda _: recipes), node)
            original, positions = node.open, []

            def look(place: Any) -> Any:
                positions.append(one.strategy.opening)
                return original(place)

            node.open = look  # type: ignore[method-assign]
            one.go_on(4)
            return positions

        return World(Script(1)).run(story)[0]

    assert opened([SpartaRecipe(every_third, 2), DiLoCoRecipe(OUTER, 4)]) == [0, 0, 1]
    assert opened([DiLoCoRecipe(OUTER, 4), SpartaRecipe(every_third, 2)]) == [1, 0, 1]


class TestBeforeAndAfter:
    """Gradients every step, and weights now and then."""

    def row(self) -> Row:
        return Row(ROW.kind, lambda _: [AllReduceRecipe(), LocalSGDRecipe(3)])

    def test_it_runs(self) -> None:
        results = World(Script(2, no={2})).run(lambda node: Training(self.row(), node).run(7))
        weights: list[list[Tensor]] = [training.weights for training in results.values()]
        assert_close(weights[0], weights[1], rtol=0, atol=0)

    def test_a_node_that_would_join_is_told_that_it_cannot_and_frees_the_others(self) -> None:
        def story(node: Node) -> int:
            one = Training(self.row(), node)
            if not node.joins:
                return one.run(3).strategy.clock.steps
            with pytest.raises(SettingsError, match="both before and after"):
                one.strategy.join()
            assert node.open_rounds == []
            return 0

        world = World(Script(2, joins={1: 4}))
        assert world.run(story) == {0: 3, 1: 0}
        assert world.given_up == {4}
