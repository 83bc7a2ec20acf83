"""What is written aside takes its name when it is complete, and never before."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchft.atomic import replacing


def test_a_file_has_its_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, sync=True) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_while_it_is_written_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as draft:
        if folder:
            draft.mkdir()
            (draft / "part").write_text("half")
        else:
            draft.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_one_that_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with replacing(path, tmp_path / "aside", sync=True) as draft:
        draft.mkdir()
        (draft / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_replaced_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def broken(*_: Path) -> None:
        raise OSError("the disk is broken")

    monkeypatch.setattr("torchft.atomic.os.replace", broken)
    with pytest.raises(OSError, match="broken"), replacing(path) as draft:
        draft.mkdir()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
