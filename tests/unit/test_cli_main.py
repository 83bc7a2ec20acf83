"""The command line of `torchft`: what it takes, and what it says to what it does not take."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchft
from torchft.cli.demo import options_of
from torchft.cli.main import main, parser
from torchft.demo.options import CODECS, DemoOptions
from torchft.errors import SettingsError
from torchft.quantization import codec_names


def options(*typed: str) -> DemoOptions:
    return options_of(parser().parse_args(["demo", *typed]))


def refusal(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    """What is said on the way out with code 2."""
    try:
        code = main(typed)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == 2
    return capsys.readouterr().err


def test_a_demo_without_flags_kills_one_of_three() -> None:
    default = options()
    assert (default.replicas, default.workers, default.strategy) == (3, 1, "ddp")
    assert default.scenario is not None


def test_every_flag_reaches_its_option(tmp_path: Path) -> None:
    asked = options(
        *("--replicas=4", "--workers-per-replica=2", "--strategy=diloco", "--steps=50"),
        *("--sync-every=7", "--codec=int4", "--no-kill", "--seed=9", f"--keep={tmp_path}"),
        *("--corpus=a.txt", "--corpus=b", "--heartbeat-timeout-ms=700", "--timeout=60"),
    )
    assert asked == DemoOptions(
        replicas=4,
        workers=2,
        strategy="diloco",
        steps=50,
        sync_every=7,
        codec="int4",
        kill=False,
        seed=9,
        keep=tmp_path,
        corpus=(Path("a.txt"), Path("b")),
        heartbeat_timeout_ms=700,
        timeout_s=60.0,
    )


def test_codecs_are_those_that_lose_something() -> None:
    assert set(CODECS) == set(codec_names()) - {"fp32"}
    with pytest.raises(SettingsError, match="codec='int5': it must be one of bf16, fp8"):
        DemoOptions(codec="int5")


def test_without_a_seed_each_run_has_another() -> None:
    assert len({options().seed for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--replicas=0"], "--replicas: 0: it must be an integer, at least 1"),
        (["--replicas=x"], "--replicas: 'x': it must be an integer, at least 1"),
        (["--workers-per-replica=0"], "must be an integer, at least 1"),
        (["--steps=0"], "--steps: 0: it must be an integer, at least 1"),
        (["--sync-every=0"], "--sync-every: 0: it must be an integer, at least 1"),
        (["--seed=-1"], "--seed: -1: it must be an integer, at least 0"),
        (["--heartbeat-timeout-ms=10"], "it must be an integer, at least 300"),
        (["--timeout=0"], "0.0: it must be a number, above 0"),
        (["--timeout=soon"], "'soon': it must be a number, above 0"),
        (["--strategy=magic"], "invalid choice: 'magic'"),
        (["--codec=int5"], "invalid choice: 'int5'"),
        (["--repl=3"], "unrecognized arguments: --repl=3"),
        (["--replicas=1"], "1 group cannot lose one and go on: give --replicas 2 or more"),
        (["--steps=2"], "a run of 2 steps has no middle"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], typed: list[str], said: str
) -> None:
    assert said in refusal(capsys, "demo", *typed)


def test_an_unreadable_corpus_ends_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "absent.txt"
    said = refusal(capsys, "demo", f"--corpus={missing}")
    assert f"cannot read {missing}: No such file or directory; check --corpus" in said


def test_logs_never_mix_with_those_of_another_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "old.log").touch()
    assert "holds files already" in refusal(capsys, "demo", f"--keep={tmp_path}")


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'train'" in refusal(capsys, "train")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["dmeo"], "demo"),
        (["demo", "--stepz=3"], "--steps"),
        (["demo", "--strategy=dioco"], "diloco"),
        (["diloco", "sever"], "server"),
    ],
)
def test_a_mistyped_word_brings_the_nearest_known_one(
    capsys: pytest.CaptureFixture[str], typed: list[str], meant: str
) -> None:
    assert f"did you mean '{meant}'?" in refusal(capsys, *typed)


def test_a_word_like_no_other_brings_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in refusal(capsys, "xyzzy")


@pytest.mark.parametrize(("typed", "old"), [("--weathr", "--weather"), ("--evry", "--every")])
def test_a_flag_of_an_earlier_release_is_no_suggestion(
    capsys: pytest.CaptureFixture[str], typed: str, old: str
) -> None:
    assert f"'{old}'" not in refusal(capsys, "simulate", typed)


def test_the_version_is_said_once_for_python_and_rust() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    crates = tomllib.loads((root / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert torchft.__version__ == project == crates.replace("-alpha.", "a")


def test_a_flag_in_the_wrong_place_is_not_suggested_to_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(capsys, "demo", "--version")
    assert "--version belongs to another command, or before this one" in said


def test_every_flag_has_a_help_text() -> None:
    assert [flag for flag, help_text in flags_of(parser()) if not help_text] == []


def flags_of(top: argparse.ArgumentParser) -> Iterator[tuple[str, str | None]]:
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from flags_of(below)
        elif action.option_strings:
            yield f"{top.prog} {action.option_strings[0]}", action.help


def test_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in refusal(capsys)


@pytest.mark.parametrize(
    ("typed", "taught"),
    [
        (["--help"], ["demo", "doctor", "--version"]),
        (["demo", "--help"], ["examples:", "--no-kill", "--seed", "exit code is 0 only if"]),
        (["doctor", "--help"], ["--lighthouse", "--json", "exit code is 1 if"]),
        (["--version"], [f"torchft {torchft.__version__} (the interface of torchft 0.1.1)"]),
        (["completion", "bash"], ["_shtab_torchft", "--heartbeat-timeout-ms", "demo-server"]),
    ],
)
def test_help_teaches(
    capsys: pytest.CaptureFixture[str], typed: list[str], taught: list[str]
) -> None:
    code: object
    try:
        code = main(typed)
    except SystemExit as end:
        code = end.code
    assert code == 0
    said = capsys.readouterr().out
    assert [words for words in taught if words not in said] == []
