"""The examples of the simulator from their command lines, and the code in its documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpt  # noqa: E402
import mnist  # noqa: E402
from pictures import digits  # noqa: E402

from torchft import strategies  # noqa: E402
from torchft.experiments import (  # noqa: E402
    Trainer,
    describe_machine,
    models,
)

TINY_PICTURES = ["--nodes", "2", "--steps", "4", "--batch", "8", "--H", "2", "--model", "mlp"]
TINY_TEXT = [
    *("--num_nodes", "2", "--max_steps", "4", "--batch_size", "2", "--H", "2", "--device", "cpu"),
    *("--block_size", "8", "--val_size", "2", "--warmup_steps", "1"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever is written lands here; threads are as before afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- pictures


def test_the_first_command_trains_and_says_that_it_is_not_mnist(elsewhere: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "mnist.py"), *TINY_PICTURES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "this is not MNIST" in done.stdout
    assert re.search(r"diloco, seed 1: held-out loss \d\.\d{4} in ", done.stdout)
    assert not list(elsewhere.iterdir())


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "digits", lambda: digits(256, 32))


def test_the_table_has_five_strategies_over_three_seeds(elsewhere: Path, few_digits: None) -> None:
    mnist.main([*TINY_PICTURES, "--table", "--plot", "--out", "here"])
    lines = (elsewhere / "here" / "table.md").read_text().splitlines()
    header = ["strategy", "final loss", "training time", "it/s", "final LR"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == header
    assert [line.split()[1] for line in lines[4:]] == list(mnist.FIVE)
    assert all(re.search(r"\d\.\d{4} ± \d\.\d{4}", line) for line in lines[4:])
    assert "4 steps of 8 pictures each (64 in all)" in lines[0]
    assert "of 3 seeds" in lines[0]
    assert describe_machine("cpu") in lines[0]
    assert (elsewhere / "here" / "loss.png").stat().st_size > 1000


def test_one_seed_has_no_spread(elsewhere: Path, few_digits: None) -> None:
    mnist.main([*TINY_PICTURES, "--table", "--seeds", "1", "--out", "here"])
    text = (elsewhere / "here" / "table.md").read_text()
    assert "one seed" in text and "±" not in text
    assert len(text.splitlines()) == 4 + len(mnist.FIVE)


def test_the_path_of_exo_gyms_example_leads_to_ours() -> None:
    assert (ROOT / "example" / "mnist.py").samefile(EXAMPLES / "mnist.py")


def test_all_strategies_see_equal_pictures_at_equal_rates() -> None:
    pictures = digits(256, 32)
    settings = [
        mnist.Settings(strategy=name, nodes=2, steps=4, batch=8, model="mlp", device="cpu")
        for name in mnist.STRATEGIES
    ]
    runs = [mnist.train(one, pictures, quiet=True) for one in settings]
    first = runs[0].history
    for run in runs:
        assert run.history[0].losses == first[0].losses
        assert [row.lr for row in run.history] == [row.lr for row in first]


def test_batch_norm_is_simulated() -> None:
    settings = mnist.Settings(nodes=2, steps=2, batch=8, model="cnn", device="cpu")
    result = mnist.train(settings, digits(256, 32), quiet=True)
    counted = [model.net[1].num_batches_tracked.item() for model in result.models]
    assert counted == [2, 2]


def test_mnist_that_is_not_there_is_no_silent_fallback(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="add --download"):
        mnist.main(["--data", str(elsewhere)])


def test_a_download_that_fails_says_so_and_goes_on_with_digits(
    monkeypatch: pytest.MonkeyPatch, few_digits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(folder: Path, *, download: bool) -> Any:
        raise mnist.NotThere("no route to host")

    monkeypatch.setattr(mnist, "mnist", unreachable)
    mnist.main([*TINY_PICTURES, "--download"])
    out, err = capsys.readouterr()
    assert "MNIST cannot be had: no route to host" in err
    assert "Pictures: scikit-learn's digits" in out


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("strategy", gpt.STRATEGIES)
def test_a_gpt_trains_by_each_strategy(
    strategy: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "text").write_text("round and round it goes. " * 40)
    gpt.main([*TINY_TEXT, "--text", "text", "--strategy", strategy])
    assert re.search(r"step 4: loss of the mean model \d\.\d{4}", capsys.readouterr().out)


def test_a_sample_is_written_in_the_characters_of_the_text(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "text").write_text("abcab" * 100)
    flags = ["--text", "text", "--level", "character", "--prompt", "ab", "--generate", "20"]
    gpt.main([*TINY_TEXT, *flags])
    sample = capsys.readouterr().out.splitlines()[-1]
    assert sample.startswith("ab")
    assert len(sample) == 22
    assert set(sample) <= set("abc\N{REPLACEMENT CHARACTER}")


def test_a_gpt_trains_on_the_standard_library(capsys: pytest.CaptureFixture[str]) -> None:
    gpt.main(TINY_TEXT)
    out = capsys.readouterr().out
    assert "the sources of Python's standard library" in out
    assert "a vocabulary of 256" in out


def test_a_gpt_trains_on_memmaps(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = np.random.default_rng(0).integers(0, 50, 1000)
    for name in ("train.bin", "val.bin"):
        numbers.astype(np.uint16).tofile(elsewhere / name)
    gpt.main([*TINY_TEXT, "--memmap", "train.bin", "val.bin", "--vocab-size", "50"])
    assert "1,000 tokens of a vocabulary of 50;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memmap", "a", "b", "--end_pc", "0.5"], "--memmap has two files"),
        (["--vocab_size", "50"], "a text brings its own"),
        (["--start_pc", "0.9", "--end_pc", "0.5"], "shares that rise"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gpt.main([*TINY_TEXT, *flags])


def test_the_shares_of_a_text_are_what_is_trained_on(elsewhere: Path) -> None:
    (elsewhere / "text").write_text("x" * 1000)
    shares = ["--start_pc", "0.1", "--end_pc", "0.3", "--val_start_pc", "0.5"]
    train, held_out, _, _ = gpt.load(gpt.command_line([*TINY_TEXT, "--text", "text", *shares]))
    assert (len(train.tokens), len(held_out.tokens)) == (200, 500)


# ---------------------------------------------------------------------- documents


def test_every_strategy_has_a_row_in_its_document() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text()
    rows = {
        line.split("`")[1].split("(")[0] for line in text.splitlines() if "Strategy" in line[:40]
    }
    assert rows == {name for name in strategies.__all__ if name.endswith("Strategy")} - {"Strategy"}


SENT = {
    "all-reduce": (strategies.SimpleReduceStrategy, {}, "1.41 MB"),
    "DiLoCo": (strategies.DiLoCoStrategy, {"H": 20}, "71 KB"),
    "FedAvg": (strategies.FedAvgStrategy, {"H": 20}, "71 KB"),
    "Streaming": (strategies.StreamingDiLoCoStrategy, {"H": 20, "fragments": 4}, "71 KB"),
    "SPARTA": (strategies.SPARTAStrategy, {"p_sparta": 0.005}, "7 KB"),
    "DeMo": (strategies.DeMoStrategy, {}, "42 KB"),
}


@pytest.mark.parametrize("name", SENT)
def test_bytes_a_step_are_what_the_document_says(name: str) -> None:
    cls, settings, said = SENT[name]
    trainer = Trainer(models.Mlp(), digits(512, 32).train, device="cpu")
    trainer.fit(
        num_epochs=20, strategy=cls(**settings), num_nodes=4, max_steps=20, disable_logging=True
    )
    a_step = max(trainer.result.bytes_sent) / 20
    shown = f"{a_step / 1e6:.2f} MB" if a_step > 1e6 else f"{a_step / 1e3:.0f} KB"
    assert shown == said
    text = (ROOT / "docs" / "strategies.md").read_text()
    example = next(line for line in text.splitlines() if line.startswith("Example:"))
    assert re.search(rf"{name}[^.;]*?\b{said}", example)
