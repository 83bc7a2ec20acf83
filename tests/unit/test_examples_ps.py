"""What the example of the parameter server reads: its settings and its texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "parameter_server"
sys.path.insert(0, str(EXAMPLE))

pytest.importorskip("yaml")
pytest.importorskip("pydantic")

from asked import Asked, Data, command_line, read  # noqa: E402
from stories import windows_of  # noqa: E402

from torchft.errors import SettingsError, UnreachableError  # noqa: E402


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "SYNC_EVERY", "NUM_FRAGMENTS", "WORKER_ID", "CODEC", "DYLU"):
        monkeypatch.delenv(f"DILOCO_{name}", raising=False)


def asked(*typed: str) -> Asked:
    return read(command_line().parse_intermixed_args(typed))


# ---------------------------------------------------------------------- settings


def test_the_line_that_users_type() -> None:
    found = asked(
        *("-p", str(EXAMPLE), "-t", "streaming.yaml", "train", "--diloco-server", "gpu:8512"),
        *("--diloco-sync-every", "40", "--diloco-worker-id", "me", "--diloco-no-bf16"),
        *("--diloco-dylu", "--diloco-heartbeat", "5", "--num-shards", "2", "--shard-index", "1"),
    )
    assert found.diloco is not None
    assert found.diloco.model_dump() == {
        "server": "gpu:8512",
        "sync_every": 40,
        "num_fragments": 4,
        "worker_id": "me",
        "codec": "fp32",
        "dylu": True,
        "heartbeat_interval_s": 5.0,
    }
    assert found.output_dir.name == "streaming_shard1"


def test_the_files_that_come_with_it() -> None:
    every = {path.name: asked("-t", path.name) for path in EXAMPLE.glob("*.yaml")}
    assert every.keys() == {"default.yaml", "streaming.yaml", "baseline.yaml", "demo.yaml"}
    assert every["baseline.yaml"].diloco is None
    assert every["default.yaml"].model == every["baseline.yaml"].model


# `diloco worker --sync-every 7 -- train.py`: what was typed there is not undone by a file.
def test_a_variable_wins_over_the_file_and_a_flag_over_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DILOCO_SYNC_EVERY", "7")
    left = asked().diloco
    assert left is not None
    assert left.sync_every is None, "left to the variable"
    flag = asked("--diloco-sync-every", "9").diloco
    assert flag is not None
    assert flag.sync_every == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {max_step: 5}", "train.max_step: Extra inputs are not permitted"),
        ("modell: {}", "modell: Extra inputs"),
        ("train: {lr: -1}", "train.lr: Input should be greater than 0"),
        ("data: {num_shards: 2, shard_index: 2}", "shard 2 of 2: they count from 0"),
        ("data: {paths: [x], hub: y}", "give paths or hub, not both"),
        ("- 1", "holds no sections"),
        ("a: [", "is no YAML"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=words):
        asked("-p", str(tmp_path), "-t", "x.yaml")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*none.yaml.*see -p and -t"):
        asked("-t", "none.yaml")


def test_the_baseline_takes_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="it trains without a server"):
        asked("-t", "baseline.yaml", "--diloco-server", "x:1")
    monkeypatch.setenv("DILOCO_SERVER", "x:1")
    with pytest.raises(SettingsError, match="it trains without a server"):
        asked("-t", "baseline.yaml")


# ---------------------------------------------------------------------- texts


def rows(data: Data, context: int = 4) -> list[bytes]:
    train, _ = windows_of(data, context)
    return [bytes(train[at]["input_ids"].tolist()) for at in range(len(train))]


def test_shards_have_different_parts_and_the_same_held_out_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(100)))
    parts = [Data(paths=(path,), num_shards=3, shard_index=index) for index in range(3)]
    found = [rows(part) for part in parts]
    everything = sorted(row for part in found for row in part)
    assert everything == [bytes(range(at, at + 4)) for at in range(0, 88, 4)]
    held_out = [windows_of(part, 4)[1].rows.tolist() for part in parts]
    assert held_out[0] == held_out[1] == held_out[2]


def write_parquet(path: Path, texts: list[Any], column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: texts}), path)


def test_texts_of_parquet_files_in_a_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", ["One day", None, ""])
    write_parquet(tmp_path / "2.parquet", ["a cat" * 20])
    train, _ = windows_of(Data(paths=(tmp_path,)), 9)
    assert bytes(train[0]["input_ids"].tolist()) == b"One day\n\n"
    short = Data(paths=(tmp_path,), max_bytes=40)
    assert len(windows_of(short, 4)[0]) == 9, "36 of 40 bytes"


def test_a_column_that_is_not_there_and_a_file_that_is_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", ["x"], column="story")
    with pytest.raises(SettingsError, match=r"no column 'text'; set data.column to one of story"):
        rows(Data(paths=(tmp_path / "1.parquet",)))
    (tmp_path / "2.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(SettingsError, match=r"cannot read .*2.parquet"):
        rows(Data(paths=(tmp_path / "2.parquet",)))


def test_the_standard_library_is_the_text_where_none_is_named() -> None:
    train, held_out = windows_of(Data(), 128)
    assert len(train) > 1000
    assert len(held_out) == 64


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(SettingsError, match="too short for 1 shards of windows of 4"):
        rows(Data(paths=(tmp_path / "a.txt",)))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub
    with pytest.raises(UnreachableError, match="cannot fetch roneneldan/TinyStories from the hub"):
        rows(Data(hub="roneneldan/TinyStories"))


def test_a_data_set_of_the_hub_is_read_like_files_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ["Once upon a time. " * 9])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ["no"])
    asked_for: list[Any] = []

    def snapshot_download(name: str, **how: Any) -> str:
        asked_for.append((name, how))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert rows(Data(hub="some/stories"))[0] == b"Once"
    assert asked_for == [
        ("some/stories", {"repo_type": "dataset", "allow_patterns": ["**train*.parquet"]})
    ]
