"""What a configuration takes, what it refuses in words, and that it can be written down again."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.errors import SettingsError
from torchft.experiments.config import (
    SimulateConfig,
    StrategyConfig,
    difference,
    from_mapping,
    needed,
    read_config,
    read_part,
    whole,
)
from torchft.experiments.tables import as_yaml
from torchft.simulator.faults import FaultEvent, FaultSchedule
from torchft.simulator.network import NetworkModel, NodeProfile


def test_nothing_said_is_the_default() -> None:
    assert from_mapping({}) == SimulateConfig()
    assert difference(SimulateConfig()) == {}


def test_one_value_stands_where_a_list_is_swept() -> None:
    config = from_mapping({"strategies": "diloco", "nodes": 8, "lr": 0.1, "seeds": 3})
    assert config.strategies == (StrategyConfig(name="diloco"),)
    assert (config.nodes, config.lr, config.seeds) == ((8,), (0.1,), (3,))


def test_one_strategy_with_two_options_has_two_labels() -> None:
    slow = {"name": "diloco", "label": "slow", "options": {"outer_optimizer": {"lr": 0.1}}}
    config = from_mapping({"strategies": ["diloco", slow]})
    assert [one.shown for one in config.strategies] == ["diloco", "slow"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strategys": 1}, "there is no setting strategys: did you mean strategies?"),
        ({"network": {"node": []}}, "no setting network.node: did you mean nodes?"),
        (
            {"network": {"nodes": [{"up_bp": 1}]}},
            "no setting network.nodes.0.up_bp: did you mean up_bps",
        ),
        ({"networks": {"a": {"nods": []}}}, "no setting networks.a.nods: did you mean nodes?"),
        ({"faults": {"failures": {"rat": 0.1}}}, "failures.rat: did you mean rate?"),
        ({"zzz": 1}, "there is no setting zzz: there are autocast, "),
        ({"strategies": [{"nam": "diloco"}]}, "no setting strategies.0.nam: did you mean name?"),
        ({"strategies": ["dilocco"]}, "nothing is called 'dilocco': did you mean diloco?"),
        ({"strategies": ["diloco", "diloco"]}, "diloco twice: give each a label of its own"),
        ({"strategies": []}, "strategies is empty"),
        ({"model": "mpl"}, "model: nothing is called 'mpl': did you mean mlp?"),
        ({"nodes": [0]}, "nodes=0: it must be an integer, at least 1"),
        ({"nodes": [2, 2]}, "nodes has 2 twice"),
        ({"nodes": [1.5]}, "nodes.0: .*, not 1.5"),
        ({"sync_every": 0}, "sync_every=0: it must be an integer, at least 1"),
        ({"steps": "many"}, "steps: .*, not 'many'"),
        ({"steps": 0}, "steps=0: it must be an integer, at least 1"),
        ({"lr": 0}, "lr=0.0: it must be a number, above 0"),
        ({"seeds": [-1]}, "seeds=-1: it must be an integer, at least 0"),
        ({"equal": "time"}, "equal: .*'tokens' or 'steps', not 'time'"),
        ({"network": {"nodes": [{"latency_s": -1}]}}, "network.nodes.0: latency_s=-1"),
        ({"networks": {"a": {"failures": {"rate": 0.1}}}}, "no setting networks.a.failures"),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        from_mapping(wrong, source="sweep.yaml")
    assert str(refused.value).startswith("sweep.yaml: ")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as refused:
        from_mapping({"nodess": 1, "faults": {"pace": 1}})
    assert "nodess" in str(refused.value)
    assert "faults.pace" in str(refused.value)


CONFIGS = [
    {},
    {"strategies": [{"name": "diloco", "label": "x", "options": {"outer_optimizer": {"lr": 0.4}}}]},
    {"network": None},
    {"network": {"nodes": [{"step_s": 1, "up_bps": 8}]}, "faults": {"failures": {"rate": 0.1}}},
    {"faults": {"events": [{"node": 1, "event": "dies", "step": 3}]}, "networks": {"a": {}}},
    {"nodes": [2, 4], "equal": "steps", "max_norm": 1.0, "data": "a/b.txt"},
]


@pytest.mark.parametrize("given_", CONFIGS)
def test_what_is_written_down_is_read_back(given_: dict[str, Any], tmp_path: Path) -> None:
    config = from_mapping(given_)
    for name, written in (("whole", whole(config)), ("difference", difference(config))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(as_yaml(written))
        assert from_mapping(read_config(path)) == config


@given(
    nodes=st.lists(st.integers(1, 64), min_size=1, unique=True),
    lr=st.lists(st.floats(1e-6, 10), min_size=1, unique=True),
    steps=st.integers(1, 10_000),
    norm=st.none() | st.floats(0.1, 10),
)
def test_the_difference_alone_gives_the_configuration_back(
    nodes: list[int], lr: list[float], steps: int, norm: float | None
) -> None:
    config = from_mapping({"nodes": nodes, "lr": lr, "steps": steps, "max_norm": norm})
    brief = difference(config)
    assert from_mapping(brief) == config
    assert ("steps" in brief) == (steps != SimulateConfig().steps)


def test_toml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text("nodes = [2, 4]\n[faults]\npace_s = 0.5\n[[network.nodes]]\nstep_s = 0.2\n")
    config = from_mapping(read_config(path))
    assert config.nodes == (2, 4)
    assert config.network == NetworkModel(nodes=[NodeProfile(step_s=0.2)])
    assert config.faults == FaultSchedule(pace_s=0.5)


def test_faults_and_their_trace_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sky").mkdir()
    (tmp_path / "sweep.yaml").write_text("faults: sky/rain.yaml\nnetworks: {b: sky/sun.yaml}\n")
    (tmp_path / "sky/rain.yaml").write_text("trace: fails.csv\n")
    (tmp_path / "sky/sun.yaml").write_text("nodes: [{step_s: 1}]\n")
    (tmp_path / "sky/fails.csv").write_text("step,node,event\n1,1,dies\n")
    config = from_mapping(read_config(tmp_path / "sweep.yaml"))
    assert config.faults == FaultSchedule(trace=tmp_path / "sky/fails.csv")
    assert len(config.faults.to_events(2, 5)) == 1
    assert config.networks == {"b": NetworkModel(nodes=[NodeProfile(step_s=1.0)])}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "a: [", "is no YAML"),
        ("a.yaml", "- 1", "holds a list, no settings"),
        ("a.toml", "a = ", "is no TOML"),
        ("a.txt", "", "call it .yaml, .yml or .toml"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_config(tmp_path / name)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"cannot read absent\.yaml"):
        read_part("absent.yaml")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    assert read_config(tmp_path / "empty.yaml") == {}


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: Any) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(SettingsError, match=r"needs pydantic.*install torchft\[simulate\]"):
        needed("pydantic")


def test_an_event_in_a_configuration_is_an_event() -> None:
    config = from_mapping({"faults": {"events": [{"node": 1, "event": "dies", "time_s": 2.5}]}})
    assert config.faults is not None
    assert config.faults.events == (FaultEvent(node=1, event="dies", time_s=2.5),)


EXAMPLES = Path(__file__).parents[2] / "examples" / "simulate"


def test_the_examples_are_good() -> None:
    sweep = from_mapping(read_config(EXAMPLES / "sweep.yaml"))
    assert len(sweep.strategies) == 4
    faults = from_mapping({"faults": read_part(EXAMPLES / "faults.yaml")}).faults
    assert faults is not None
    assert len(faults.to_events(4, 300)) == 4
    network = from_mapping({"network": read_part(EXAMPLES / "network.yaml")}).network
    assert network is not None and network.slowest_step_s(4) == 0.25


def test_the_old_setting_weather_is_split() -> None:
    with pytest.warns(FutureWarning, match="network and faults"):
        config = from_mapping({"weather": {"nodes": [{"step_s": 1}], "pace_s": 2.0}})
    assert config.network == NetworkModel(nodes=[NodeProfile(step_s=1.0)])
    assert config.faults == FaultSchedule(pace_s=2.0)


@pytest.mark.parametrize("new", ["network", "faults"])
def test_the_old_setting_weather_with_what_it_is_now_is_refused(new: str) -> None:
    with pytest.raises(SettingsError, match="weather is now network and faults, and both are"):
        from_mapping({"weather": {}, new: {}})
