"""The text that the demo learns, and the model that learns it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchft.errors import SettingsError
from torchft.toy.byte_model import (
    ByteCorpus,
    ByteTransformer,
    CorpusError,
    Order,
    Shape,
    next_byte_loss,
)

TINY = Shape(context=8, width=8, heads=2, layers=1)


def test_the_standard_library_is_there_to_be_read() -> None:
    corpus = ByteCorpus.load()
    assert len(corpus.train) > 1 << 20
    assert b"import" in bytes(corpus.train[: 1 << 16].tolist())


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name * 20)
    first, again = ByteCorpus.load([tmp_path]), ByteCorpus.load([tmp_path])
    assert torch.equal(first.train, again.train)
    assert bytes(first.train[:5].tolist()) == b"a.txt"


def test_the_last_tenth_is_held_out() -> None:
    corpus = ByteCorpus(bytes(range(200)))
    assert len(corpus.train) == 180
    assert corpus.held_out.tolist() == list(range(180, 200))


def test_hidden_and_binary_files_of_a_folder_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "picture").write_bytes(b"\x89\0\0")
    (tmp_path / "poem.txt").write_text("a poem of twenty bytes")
    assert bytes(ByteCorpus.load([tmp_path]).train.tolist()) == b"a poem of twenty byt"


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"cannot read .*absent\.txt: No such file.*--corpus"):
        ByteCorpus.load([tmp_path / "absent.txt"])


def test_an_empty_file_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CorpusError, match="the corpus is empty"):
        ByteCorpus.load([tmp_path / "empty.txt"])


def test_a_folder_without_text_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no text file below"):
        ByteCorpus.load([tmp_path])


def test_a_corpus_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(CorpusError, match="longer text"):
        ByteCorpus(b"short").windows(context=64)
    with pytest.raises(CorpusError, match="held-out"):
        ByteCorpus(b"short").held_out_batch(1, context=64)


def test_targets_are_the_next_bytes() -> None:
    inputs, targets = ByteCorpus(bytes(range(100))).batch([3, 10], context=4)
    assert inputs.tolist() == [[3, 4, 5, 6], [10, 11, 12, 13]]
    assert targets.tolist() == [[4, 5, 6, 7], [11, 12, 13, 14]]


def test_held_out_windows_end_with_the_text() -> None:
    _, targets = ByteCorpus(bytes(range(200))).held_out_batch(3, context=4)
    assert targets[-1].tolist() == [196, 197, 198, 199]


@pytest.mark.parametrize("windows", [1, 2, 24, 97, 960])
def test_one_pass_visits_every_window_once(windows: int) -> None:
    order = Order(windows=windows, shards=1, rows=1, seed=4)
    assert sorted(order.batch(n)[0] for n in range(windows)) == list(range(windows))


def test_shards_never_share_a_window_in_one_pass() -> None:
    order = Order(windows=24, shards=3, rows=4)
    seen = [start for n in range(2) for shard in range(3) for start in order.batch(n, shard=shard)]
    assert sorted(seen) == list(range(24))


def test_a_shard_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match="shard 3 of 3"):
        Order(windows=24, shards=3).batch(0, shard=3)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SettingsError, match="3 heads do not divide a width of 64"):
        Shape(heads=3)


def test_the_model_sees_nothing_of_the_future() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(TINY)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 5] = 1
    assert torch.equal(model(tokens)[0, :5], model(changed)[0, :5])
    assert not torch.equal(model(tokens)[0, 5:], model(changed)[0, 5:])


def test_the_model_starts_out_knowing_nothing_and_learns() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(TINY)
    inputs, targets = ByteCorpus(b"abcdefgh" * 40).batch(range(8), context=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = next_byte_loss(model, inputs, targets)
    assert first.item() == pytest.approx(5.545, abs=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss = next_byte_loss(model, inputs, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 4.0
