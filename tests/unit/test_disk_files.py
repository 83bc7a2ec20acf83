"""What a checkpoint is made of: all of it of one step and forced to disk; none of it runs."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.saved import FILES, load, newest, save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from torchft.checkpointing import dcp, kept
from torchft.checkpointing.manifest import MANIFEST, Manifest, hash_of, read_manifest
from torchft.errors import CheckpointError


def test_all_is_forced_to_the_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        sync(file)

    def renames(source: Any, target: Any) -> None:
        if Path(target).name == kept.name_of(5):
            assert {*FILES, MANIFEST, kept.draft_of(5)} <= set(synced)
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renames)
    save(tmp_path / "folder", 5)
    assert synced == ["folder"]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path, step, keep=2)
    return tmp_path


def put(folder: Path, name: str) -> None:
    """A file of step 5 into the checkpoint of step 10."""
    shutil.copy(folder / kept.name_of(5) / name, folder / kept.name_of(10) / name)


def forge(path: Path, *, without: str = "") -> None:
    """Make the manifest of step 10 anew, of what is there now."""
    files = {name: hash_of(path / name) for name in FILES if name != without}
    manifest = Manifest.of_text((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(replace(manifest, files=files).to_text())


def refused(folder: Path, said: str, change: Callable[[Path], None]) -> None:
    path = folder / kept.name_of(10)
    change(path)
    with pytest.raises(CheckpointError, match=said):
        load(path, 10)
    assert newest(folder) == 5


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_refused_by_name(mixed: Path, name: str) -> None:
    refused(
        mixed, f"^{name} has (another SHA-256|228 bytes instead of 230)", lambda _: put(mixed, name)
    )


def test_state_of_another_step_is_refused_even_with_a_manifest_that_fits(mixed: Path) -> None:
    def change(path: Path) -> None:
        put(mixed, "rank-0.json")
        forge(path)

    refused(mixed, "its state is of step 5", change)


@pytest.mark.parametrize("name", [".metadata", "rank-0.json"])
def test_a_manifest_that_leaves_out_what_is_read_is_refused(mixed: Path, name: str) -> None:
    refused(mixed, f"the manifest lacks .'{name}'", lambda path: forge(path, without=name))


class Runs:
    """Code in a pickle."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('it ran')",)


def test_a_folder_of_a_stranger_runs_no_code(mixed: Path) -> None:
    def change(path: Path) -> None:
        (path / ".metadata").write_bytes(pickle.dumps(Runs()))
        forge(path)

    refused(mixed, "names builtins.exec, which no index of tensors has", change)


def test_values_that_torch_would_unpickle_are_refused(mixed: Path) -> None:
    def change(path: Path) -> None:
        index = pickle.loads((path / ".metadata").read_bytes())
        index.state_dict_metadata = {
            key: BytesStorageMetadata() for key in index.state_dict_metadata
        }
        (path / ".metadata").write_bytes(pickle.dumps(index))
        forge(path)

    refused(mixed, "BytesStorageMetadata", change)


def test_the_files_that_are_read_are_known_before(mixed: Path) -> None:
    assert dcp.files_of(1) == {".metadata", "rank-0.json"}
    assert dcp.files_of(2) > {"rank-1.json"}
    assert set(read_manifest(mixed / kept.name_of(10), 10).files) == set(FILES)
