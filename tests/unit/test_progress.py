"""How far a rank has come."""

from __future__ import annotations

from torchft.manager.progress import Progress


def test_a_commit_ends_a_row_of_discarded_steps_and_a_new_process_is_new_no_more() -> None:
    progress = Progress(fresh=True)
    progress.discard()
    progress.discard()
    assert (progress.fresh, progress.discarded, progress.step) == (True, 2, 0)
    progress.commit(groups=3)
    assert progress == Progress(fresh=False, step=1, batches_committed=3)


def test_a_round_without_a_step_counts_none() -> None:
    progress = Progress(fresh=True, step=7, discarded=1)
    progress.meet()
    assert progress == Progress(fresh=False, step=7)


def test_a_step_that_could_not_be_applied_is_taken_back_with_its_batches() -> None:
    progress = Progress(fresh=False, step=7, batches_committed=14)
    progress.commit(groups=2)
    progress.fall_behind(groups=2)
    assert progress == Progress(fresh=False, step=7, batches_committed=14)


def test_what_is_saved_is_how_far_it_came_and_not_how_it_fares() -> None:
    healed = Progress(fresh=True, discarded=2)
    healed.load_state_dict(Progress(fresh=False, step=7, batches_committed=14).state_dict())
    assert healed == Progress(fresh=True, discarded=2, step=7, batches_committed=14)


def test_nan_in_an_average_is_no_failure_and_ends_no_row_of_them() -> None:
    progress = Progress(fresh=True)
    progress.discard(heal_failed=True)
    progress.skip(met=True)
    assert progress.heals_failed == 0
    assert (progress.fresh, progress.discarded, progress.skipped) == (False, 1, 1)
    assert progress.commit_failures == 0, "its last step is none that a new process group mends"
    progress.discard()
    assert (progress.discarded, progress.skipped, progress.commit_failures) == (2, 0, 2)


def test_who_has_not_got_the_others_state_is_new_after_nan_too() -> None:
    progress = Progress(fresh=True)
    progress.skip(met=False)
    assert progress.fresh
