"""Every strategy passes the same battery; a new one is a row."""

from __future__ import annotations

import copy

import pytest
from helpers.peers import Node, Script, World
from helpers.reference import reference
from helpers.tiny import digest
from helpers.training import ROWS, STEPS, Row, Training
from torch.testing import assert_close

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


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
    if row.is_before:
        pytest.skip("a manager's matter: gradients are not sent by whoever could not heal")
    script = Script(3, joins={2: 2}, unhealed={2: 2})
    # Rounds differ in size: nobody gets an average when a member does not know which is sent.
    expected = Script(3, joins={2: 2}, unhealed={2: 2}, no={2} if row.gives_up_without_heal else ())
    results = train(row, script)
    for node, weights in reference(row.kind, expected, STEPS).items():
        assert_close(results[node].weights, weights, rtol=0, atol=2e-6)
    assert len({digest(r.strategy.shared_state_dict()) for r in results.values()}) == 1


@every_row
def test_an_opening_round_gives_all_the_first_ones_weights(row: Row) -> None:
    if row.is_before:
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
    assert all(count >= STEPS / max(1, row.kind.every) for count in looks.values())


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
