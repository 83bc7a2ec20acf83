"""Which checkpoints of a folder are loaded, kept and due; what a manifest notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchft.atomic import gone_of
from torchft.checkpointing import kept
from torchft.checkpointing.folder import CheckpointFolder
from torchft.checkpointing.kept import Found
from torchft.checkpointing.manifest import DamagedError, Manifest, hash_of, read_manifest


def whole(*steps: int) -> list[Found]:
    return [Found(kept.name_of(step), step, True) for step in steps]


def damaged(step: int) -> Found:
    return Found(kept.name_of(step), step, False)


def draft(step: int, *, whole: bool = False) -> Found:
    return Found(kept.draft_of(step), step, whole)


def written(folder: CheckpointFolder, step: int, keep: int = 2) -> Path:
    at = folder.begin(step)
    (at / "weights").write_text(f"weights of {step}")
    folder.finish(at, Manifest(step, 1, "group_0", {"weights": hash_of(at / "weights")}), keep)
    return folder.path / kept.name_of(step)


@pytest.mark.parametrize(
    "step, before, due", [(100, 99, True), (100, 100, False), (99, 0, False), (230, 195, True)]
)
def test_a_checkpoint_is_due_once_a_multiple_is_reached_or_passed(
    step: int, before: int, due: bool
) -> None:
    assert kept.is_due(step, before, 100) is due


def test_a_step_that_is_taken_again_is_due_again() -> None:
    assert kept.is_due(100, before=99, every_steps=100)
    assert not kept.is_due(99, before=100, every_steps=100)


def test_all_but_the_newest_whole_ones_are_deleted() -> None:
    assert kept.deletable(whole(300, 100, 400, 200), keep=2) == whole(100, 200)


def test_a_damaged_one_does_not_count_as_kept() -> None:
    assert kept.deletable([*whole(100, 200), damaged(300)], keep=2) == []


def test_what_is_damaged_or_half_written_goes_when_it_is_old() -> None:
    found = [damaged(50), draft(60), *whole(100, 200), draft(250)]
    assert kept.deletable(found, keep=2) == [damaged(50), draft(60)]


def test_nothing_is_deleted_while_there_are_too_few() -> None:
    assert kept.deletable([draft(10), *whole(100)], keep=2) == []


def test_half_drafts_are_never_loaded_and_damaged_ones_are_offered_to_be_named() -> None:
    found = [draft(400), *whole(100), damaged(300)]
    assert kept.newest_first(found) == [damaged(300), *whole(100)]


def test_a_whole_draft_is_loaded_before_the_damaged_one_that_it_was_to_replace() -> None:
    found = [damaged(300), draft(300, whole=True), *whole(100)]
    assert kept.newest_first(found) == [draft(300, whole=True), damaged(300), *whole(100)]


def test_what_was_being_deleted_is_never_loaded() -> None:
    gone = kept.of(gone_of(kept.name_of(5)), is_whole=lambda _: True)
    assert gone is not None and kept.newest_first([gone]) == []


@pytest.mark.parametrize("name", ["step-7", "notes", "step-0000000100.bak", ".step-0000000100"])
def test_what_others_put_into_the_folder_is_left_alone(name: str) -> None:
    assert kept.of(name, is_whole=lambda _: True) is None


def test_names_sort_by_step() -> None:
    steps = [9, 10, 123, 99_999]
    assert sorted(map(kept.name_of, steps)) == [kept.name_of(step) for step in steps]


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = written(CheckpointFolder(tmp_path), 5)
    manifest = read_manifest(path, 5)
    assert Manifest.of_text(manifest.to_text()) == manifest
    manifest.check_hashes(path, manifest.files)


def lose(path: Path) -> None:
    (path / "weights").unlink()


def cut(path: Path) -> None:
    (path / "weights").write_text("weights")


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def spoil_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[1]")


@pytest.mark.parametrize("harm", [lose, cut, lose_manifest, spoil_manifest])
def test_a_checkpoint_that_lost_something_is_not_whole(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = CheckpointFolder(tmp_path)
    written(folder, 5)
    harm(written(folder, 10))
    assert {one.step: one.whole for one in folder.found()} == {5: True, 10: False}


def test_a_changed_byte_is_found_by_its_hash(tmp_path: Path) -> None:
    path = written(CheckpointFolder(tmp_path), 5)
    (path / "weights").write_text("weights of 6")
    manifest = read_manifest(path, 5)
    with pytest.raises(DamagedError, match="weights has another SHA-256"):
        manifest.check_hashes(path, manifest.files)


def test_a_renamed_checkpoint_is_not_of_that_step(tmp_path: Path) -> None:
    path = written(CheckpointFolder(tmp_path), 5)
    with pytest.raises(DamagedError, match="is of step 5"):
        read_manifest(path, 6)


def test_a_damaged_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    cut(written(folder, 5))
    written(folder, 5)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name_of(5)]
    assert [one.whole for one in folder.found()] == [True]


def test_what_a_process_that_died_left_of_a_draft_is_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.begin(5) / "half").write_text("of it")
    assert list(folder.begin(5).iterdir()) == []
