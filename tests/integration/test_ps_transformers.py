"""`transformers.Trainer` as a worker: real Trainers against a real server in this process."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import options, plain_outer
from torch import nn

from torchft.errors import SettingsError
from torchft.parameter_server.server.server import DiLoCoServer

transformers = pytest.importorskip("transformers")

from torchft.integrations import DiLoCoCallback  # noqa: E402
from torchft.integrations.transformers import _stepped  # noqa: E402


class Tiny(nn.Module):
    """What a Trainer needs of a model."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.layer(x)
        return {"loss": ((seen - labels) ** 2).mean(), "logits": seen}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(at))
        if at < 0:
            raise IndexError
        return {"x": x, "labels": x.flip(0)}


class Breaks(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
    """An exception after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("out of memory")


class Reports(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
    """As W&B's: sees what is in the logs when its turn comes."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def trainer(folder: Path, *callbacks: Any, steps: int = 10, **more: Any) -> Any:
    asked = {"max_steps": steps, "logging_steps": 1, "save_strategy": "no", **more}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **asked,
    )
    made = transformers.Trainer(
        Tiny(), arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks)
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def server_of(folder: Path, **more: Any) -> DiLoCoServer:
    return DiLoCoServer(
        options(folder / "server", 1, outer_optimizer=plain_outer, codec="fp32", **more)
    )


def workers_of(server: DiLoCoServer) -> set[str]:
    from torchft.parameter_server.worker.client import DiLoCoClient

    client = DiLoCoClient(server.address)
    try:
        return set(client.get("/v1/status")["workers"])
    finally:
        client.close()


def test_a_trainer_submits_all_it_trained_and_leaves(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        callback = DiLoCoCallback(server.address, sync_every=4, worker_id="t")
        made = trainer(tmp_path, callback)
        made.train()
        assert workers_of(server) == set()
    assert callback.worker is not None
    assert callback.worker.local_step == 10
    assert callback.worker.sync_count == 3, "after 4, 8, and the last two steps"


# With one worker, an outer learning rate of 1 and no momentum the common weights are its own.
def test_alone_and_without_momentum_it_is_the_training_that_it_would_be_anyway(
    tmp_path: Path,
) -> None:
    alone = trainer(tmp_path / "alone")
    alone.train()
    with server_of(tmp_path) as server:
        made = trainer(tmp_path, DiLoCoCallback(server.address, sync_every=4))
        made.train()
    torch.testing.assert_close(made.model.state_dict(), alone.model.state_dict())


def test_steps_of_the_optimizer_count_and_micro_batches_do_not(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        callback = DiLoCoCallback(server.address, sync_every=4)
        trainer(tmp_path, callback, steps=8, gradient_accumulation_steps=3).train()
    assert callback.worker is not None
    assert (callback.worker.local_step, callback.worker.sync_count) == (8, 2)


def test_hooks_go_to_the_optimizer_that_steps() -> None:
    from accelerate import Accelerator

    plain = torch.optim.SGD(Tiny().parameters(), lr=0.1)
    assert _stepped(Accelerator(cpu=True).prepare(plain)) is plain
    assert _stepped(plain) is plain


def test_without_an_address_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DILOCO_SERVER", raising=False)
    callback, reports = DiLoCoCallback(), Reports()
    made = trainer(tmp_path, callback, reports, save_strategy="steps", save_steps=5)
    made.train()
    assert callback.worker is None
    assert not any("diloco/" in name for logs in reports.seen for name in logs)


def test_the_address_and_the_rest_come_from_variables_where_they_are_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server_of(tmp_path) as server:
        monkeypatch.setenv("DILOCO_SERVER", server.address)
        monkeypatch.setenv("DILOCO_SYNC_EVERY", "5")
        monkeypatch.setenv("DILOCO_WORKER_ID", "of-the-variable")
        callback = DiLoCoCallback(sync_every=2)
        trainer(tmp_path, callback).train()
    assert callback.worker is not None
    assert callback.worker.worker_id == "of-the-variable"
    assert callback.worker.sync_count == 5, "the argument wins over the variable"


NAMES = {
    *("sync_count", "local_step", "last_sync_time", "total_sync_time", "last_send_mb"),
    *("last_recv_mb", "steps_per_second", "sync_every", "bandwidth"),
}


def test_what_it_did_is_logged_ahead_of_those_who_report(tmp_path: Path) -> None:
    reports = Reports()
    with server_of(tmp_path) as server:
        made = trainer(tmp_path, reports)
        DiLoCoCallback(server.address, sync_every=4).add_to(made)
        made.train()
    logs = reports.seen[8]
    assert {f"diloco/{name}" for name in NAMES} <= logs.keys()
    assert logs["diloco/local_step"] == 9
    assert logs["diloco/sync_count"] == 2
    assert logs["diloco/sync_every"] == 4
    assert logs["diloco/last_send_mb"] == pytest.approx((20 * 4 + 8) / 1e6)
    assert reports.seen[7]["diloco/bandwidth"] > 0 == reports.seen[8]["diloco/bandwidth"]
    assert made.state.log_history[8]["diloco/local_step"] == 9


@pytest.mark.parametrize("restored_by_the_trainer", [False, True])
def test_a_run_that_goes_on_is_the_same_worker(
    tmp_path: Path, restored_by_the_trainer: bool
) -> None:
    more = {"save_strategy": "steps", "save_steps": 5}
    with server_of(tmp_path) as server:
        first = DiLoCoCallback(server.address, sync_every=4)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer(tmp_path, first, Breaks(7), **more).train()
        first.stop(submit=False)
        more["restore_callback_states_from_checkpoint"] = restored_by_the_trainer
        made = trainer(tmp_path, DiLoCoCallback(server.address, sync_every=4), **more)
        made.train(resume_from_checkpoint=True)
    assert first.worker is not None
    again = next(c for c in made.callback_handler.callbacks if isinstance(c, DiLoCoCallback))
    assert again.worker is not None
    assert again.worker is not first.worker
    assert again.worker.worker_id == first.worker.worker_id
    assert again.worker.local_step == 10
    assert again.worker.sync_count == 1 + 2


def test_an_id_that_is_given_wins_over_that_of_the_checkpoint(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 5}
    with server_of(tmp_path) as server:
        trainer(tmp_path, DiLoCoCallback(server.address, worker_id="a"), steps=5, **more).train()
        callback = DiLoCoCallback(server.address, worker_id="b")
        trainer(tmp_path, callback, **more).train(resume_from_checkpoint=True)
    assert callback.worker is not None
    assert callback.worker.worker_id == "b"


def test_a_checkpoint_of_a_run_without_the_callback_is_gone_on_from(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, steps=5, **more).train()
    with server_of(tmp_path) as server:
        callback = DiLoCoCallback(server.address)
        trainer(tmp_path, callback, **more).train(resume_from_checkpoint=True)
    saved = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text())
    assert (
        saved["stateful_callbacks"]["DiLoCoCallback"]["attributes"]["progress"]["local_step"] == 5
    )


def test_no_secret_is_in_a_checkpoint(tmp_path: Path) -> None:
    callback = DiLoCoCallback("x:1", auth_token="s" * 20, auth_token_file=tmp_path / "token")
    said = json.dumps(callback.state())
    assert "s" * 20 not in said
    again = DiLoCoCallback.from_state(json.loads(said))
    assert again.state() == callback.state()


def test_after_an_exception_it_leaves_when_the_trainer_trains_again(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        breaks = Breaks(3)
        callback = DiLoCoCallback(server.address, sync_every=100, worker_id="t")
        made = trainer(tmp_path, callback, breaks)
        with pytest.raises(RuntimeError):
            made.train()
        assert workers_of(server) == {"t"}, "the Trainer has no hook for this"
        breaks.step = -1
        made.train()
        assert workers_of(server) == set()


def test_after_an_exception_it_leaves_when_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    with server_of(tmp_path) as server:
        callback = DiLoCoCallback(server.address, sync_every=100, worker_id="t")
        with pytest.raises(RuntimeError):
            trainer(tmp_path, callback, Breaks(3)).train()
        assert workers_of(server) == {"t"}
        (leave,) = at_exit
        leave()
        assert workers_of(server) == set()
    assert at_exit == []


def test_tokens_are_the_weight_where_the_trainer_counts_them(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        callback = DiLoCoCallback(server.address, sync_every=4)
        made = trainer(tmp_path, callback, steps=4, include_num_input_tokens_seen="all")
        asked: list[int] = []
        tokens = callback._tokens

        def spied(*given: Any) -> Any:
            fresh = tokens(*given)
            assert fresh is not None
            return lambda: asked.append(fresh()) or asked[-1]  # type: ignore[func-returns-value]

        callback._tokens = spied  # type: ignore[method-assign]
        made.train()
    assert asked == [8, 8, 8, 8], "rows of 4 numbers, 2 a step"


def test_old_weights_in_the_model_before_its_last_steps_are_submitted_are_refused(
    tmp_path: Path,
) -> None:
    more = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    with server_of(tmp_path) as server:
        callback = DiLoCoCallback(server.address)
        made = trainer(tmp_path, callback, load_best_model_at_end=True, **more)
        with pytest.raises(SettingsError, match="load the best checkpoint after training"):
            made.train()


def test_ranks_that_the_trainer_trains_each_by_itself_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = types.SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2)
    with server_of(tmp_path) as server:
        made = trainer(tmp_path, DiLoCoCallback(server.address))
        monkeypatch.setattr("torchft.integrations.transformers.distributed", two)
        with pytest.raises(SettingsError, match="the Trainer trains each by itself"):
            made.train()


def test_an_unknown_option_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="no option sync_evry"):
        DiLoCoCallback("x:1", sync_evry=5)


def test_the_package_is_light_until_the_callback_is_named() -> None:
    script = (
        "import sys, torchft, torchft.integrations as i; "
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules; "
        "assert i.__all__ == ['DiLoCoCallback']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
