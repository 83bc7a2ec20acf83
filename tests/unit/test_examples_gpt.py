"""The texts and the model of examples/gpt.py, each loader on a few tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from text import (  # noqa: E402
    BytePairs,
    Bytes,
    Characters,
    TextError,
    Windows,
    memmapped,
    read,
    standard_library,
    tokenised,
)
from transformer import GPT, GPTConfig  # noqa: E402

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)

# ---------------------------------------------------------------------- tokens


def test_bytes_come_back_as_the_text_they_were() -> None:
    tokens = tokenised("naïve", Bytes())
    assert len(tokens) == 6
    assert Bytes().decode(tokens.tolist()) == "naïve"


def test_characters_are_numbered_in_order_from_one() -> None:
    tokenizer = Characters.of("banana")
    assert tokenizer.vocab_size == 4
    assert tokenised("nab", tokenizer).tolist() == [3, 1, 2]
    assert tokenizer.decode([2, 1, 3]) == "ban"


def test_a_character_that_the_text_has_not_is_token_zero() -> None:
    assert list(Characters.of("ab").encode("axb")) == [1, 0, 2]


def write_gpt2_like(folder: Path) -> None:
    """Letters, and one pair that is merged."""
    tokens = {"a": 0, "b": 1, "ab": 2, "Ġ": 3}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


def test_byte_pairs_are_read_from_gpt2s_two_files(tmp_path: Path) -> None:
    write_gpt2_like(tmp_path)
    tokenizer = BytePairs.load(tmp_path)
    assert tokenizer.vocab_size == 4
    assert tokenised("abba ab", tokenizer).tolist() == [2, 1, 0, 3, 2]
    assert tokenizer.decode([2, 3, 1]) == "ab b"


def test_byte_pairs_are_read_from_one_tokenizer_json(tmp_path: Path) -> None:
    write_gpt2_like(tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    BytePairs.load(tmp_path).tokenizer.save(str(whole / "tokenizer.json"))
    for path in (whole, whole / "tokenizer.json"):
        assert tokenised("abb", BytePairs.load(path)).tolist() == [2, 1]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is no tokenizer"):
        BytePairs.load(tmp_path)


# ---------------------------------------------------------------------- files


def test_several_files_are_one_text(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    assert read([tmp_path / "one", tmp_path / "two"]) == "one\ntwo"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no such file: .*three"):
        read([tmp_path / "three"])


def test_the_standard_library_is_cut_where_asked() -> None:
    assert len(standard_library(1000)) == 1000


def test_a_memmap_is_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.arange(100, dtype=np.uint16).tofile(path)
    tokens = memmapped(path)
    assert isinstance(tokens, np.memmap)
    assert tokens[40:43].tolist() == [40, 41, 42]


def test_a_memmap_beyond_its_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.arange(100, dtype=np.uint16).tofile(path)
    with pytest.raises(TextError, match="token 99, beyond a vocabulary of 50"):
        memmapped(path, 50)


def test_a_missing_memmap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"train\.bin holds no tokens"):
        memmapped(tmp_path / "train.bin")


# ---------------------------------------------------------------------- windows


def test_a_window_comes_with_the_tokens_that_follow() -> None:
    windows = Windows(np.arange(20, dtype=np.uint16), 4)
    inputs, targets = windows[1]
    assert inputs.tolist() == [4, 5, 6, 7]
    assert targets.tolist() == [5, 6, 7, 8]
    assert inputs.dtype == torch.int64


def test_every_window_has_its_targets() -> None:
    for length in range(5, 14):
        windows = Windows(np.arange(length, dtype=np.uint16), 4)
        assert len(windows) == (length - 1) // 4
        assert windows[len(windows) - 1][1].shape == (4,)


def test_a_text_that_holds_no_window_is_refused() -> None:
    with pytest.raises(TextError, match="smaller block_size"):
        Windows(np.arange(4, dtype=np.uint16), 4)


# ---------------------------------------------------------------------- model


def test_a_new_model_knows_nothing() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (4, 9))
    loss = GPT(TINY)((tokens[:, :-1], tokens[:, 1:]))
    assert loss.shape == ()
    assert abs(loss.item() - np.log(11)) < 0.1


def test_no_token_sees_what_follows_it() -> None:
    torch.manual_seed(0)
    model, tokens = GPT(TINY).eval(), torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    same = torch.isclose(model.logits(tokens), model.logits(changed)).all(dim=2)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_the_head_and_the_embedding_are_one_weight() -> None:
    model = GPT(TINY)
    assert model.head.weight is model.tokens.weight


def test_generation_goes_on_past_the_context() -> None:
    torch.manual_seed(0)
    start = torch.tensor([[1, 2]])
    drawn = GPT(TINY).generate(start, 12, top_k=3)
    assert drawn.shape == (1, 14)
    assert drawn[0, :2].tolist() == [1, 2]
    assert int(drawn.max()) < 11


def test_one_likeliest_token_is_always_drawn() -> None:
    torch.manual_seed(0)
    model, start = GPT(TINY), torch.tensor([[1, 2]])
    once, again = (model.generate(start, 6, top_k=1) for _ in range(2))
    assert torch.equal(once, again)
