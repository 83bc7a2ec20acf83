"""A `transformers.Trainer` as a worker of the parameter server.

    trainer = Trainer(model, arguments, train_dataset=texts)
    DiLoCoCallback("gpu-1:8512", sync_every=100).add_to(trainer)
    trainer.train()

Training begins with the common weights, submits every H steps of the optimizer (not micro batches)
and ends with the last steps submitted and the newest common weights in the model. A setting that
is not given comes from its `DILOCO_*` variable; without a server's address nothing is done. Ranks
that the Trainer trains together are what `DiLoCoWorker` makes of them.

A Trainer's checkpoint has the worker's id and counts, and a run that goes on from one takes them
up: explicit argument over variable over checkpoint over default. The weights come from the server;
only a server without any takes the checkpoint's.

The Trainer has no hook for training that ends with an exception. The worker then leaves, and its
last steps are not submitted, when the process ends or trains again. A process that lives on, as a
notebook does, would be waited for: call `stop(submit=False)` there.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper  # type: ignore[import-untyped]
from torch import distributed, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from torchft.errors import SettingsError
from torchft.parameter_server.worker.options import WorkerOptions
from torchft.parameter_server.worker.worker import DiLoCoWorker

__all__ = ["DiLoCoCallback"]

_COUNTS = ("sync_count", "local_step", "refused", "sync_time_s")
"""Of a worker; they go on where a checkpoint's ended."""
_SECRET = "auth_token"
_PATHS = ("auth_token_file", "tls_ca")


class DiLoCoCallback(TrainerCallback, ExportableState):
    """Synchronises what the Trainer trains.

    Args:
        server: `host:port`; None: what `DILOCO_SERVER` says; empty: do nothing.
        options: the fields of `torchft.parameter_server.worker.options.WorkerOptions`.

    With `include_num_input_tokens_seen` the Trainer's tokens are the weight of this worker's work
    in decoupled rounds; else each step counts as one.

    Raises:
        SettingsError: an option that cannot be.
    """

    def __init__(self, server: str | None = None, **options: Any) -> None:
        for name in _PATHS:
            if isinstance(options.get(name), str):
                options[name] = Path(options[name])
        WorkerOptions.resolve(server=server, **options)
        self.worker: DiLoCoWorker | None = None
        """Of the training that goes on, or of the last one."""
        self.progress: dict[str, Any] = {}
        """A worker's id and counts, as of a checkpoint or at the end of a training."""
        self._options = {"server": server, **options}
        self._running = False
        self._tokens_seen = 0
        self._logged = (time.monotonic(), 0)

    def add_to(self, trainer: Trainer) -> None:
        """Ahead of what reports: W&B or TensorBoard would miss metrics that are added after them,
        as those of a callback in `Trainer(callbacks=…)` are."""
        trainer.callback_handler.callbacks.insert(0, self)

    def stop(self, *, submit: bool) -> None:
        """Leave the server; with `submit`, after the last steps and with the newest common weights.
        Harmless to repeat."""
        if self.worker is None or not self._running:
            return
        self._running = False
        atexit.unregister(self._leave)
        self.worker.stop(submit=submit)
        self.progress = self._now()

    # ------------------------------------------------------------------ the Trainer's hooks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Register, and take the common weights over.

        Raises:
            SettingsError: the Trainer does what would spoil the common weights.
            UnreachableError, Refused, MismatchError: there is no server, or it says no.
        """
        self.stop(submit=False)  # of a training that an exception ended
        worker = self._new_worker(args, state, more["model"], more["optimizer"])
        if not worker.active:
            return
        worker.start()
        for name in _COUNTS:
            setattr(worker, name, self.progress.get(name, getattr(worker, name)))
        self.worker, self._running = worker, True
        self._logged = (time.monotonic(), worker.sync_count)
        atexit.register(self._leave)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add `diloco/…` to what is logged, and to the Trainer's history."""
        if not self._running or logs is None:
            return
        metrics = self._metrics()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Submit the last steps, and leave."""
        self.stop(submit=True)

    def state(self) -> dict[str, Any]:
        """For a Trainer's checkpoint, as JSON; no secret is in it.

        `restore_callback_states_from_checkpoint` is not needed. It makes a callback anew with the
        arguments of the checkpoint, and puts it behind what reports.
        """
        arguments = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self._options.items()
            if value is not None and name != _SECRET
        }
        return {"args": arguments, "attributes": {"progress": self._now()}}

    # ------------------------------------------------------------------ how

    def _new_worker(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Optimizer
    ) -> DiLoCoWorker:
        options = dict(self._options)
        self._take_up(state)
        resolved = WorkerOptions.resolve(**options)
        if resolved.server:
            _check(args, optimizer)
        if not resolved.worker_id:
            options["worker_id"] = self.progress.get("worker_id")
        steps = _stepped(optimizer)
        return DiLoCoWorker(model, steps, tokens=self._tokens(args, state), **options)

    def _take_up(self, state: TrainerState) -> None:
        """What the checkpoint that the Trainer goes on from knows of this worker."""
        saved = state.stateful_callbacks
        assert isinstance(saved, dict)
        # A checkpoint of a run without the callback has no entry, and the Trainer fails to save.
        mine = saved.setdefault(type(self).__name__, self.state())
        if not isinstance(mine, dict):
            raise SettingsError("this Trainer has several DiLoCoCallbacks: remove all but one")
        self.progress = dict(mine["attributes"]["progress"])

    def _now(self) -> dict[str, Any]:
        if self.worker is None:
            return self.progress
        counts = {name: getattr(self.worker, name) for name in _COUNTS}
        return {"worker_id": self.worker.worker_id, **counts}

    def _tokens(self, args: TrainingArguments, state: TrainerState) -> Callable[[], int] | None:
        if args.include_num_input_tokens_seen in ("no", False):
            return None
        self._tokens_seen = state.num_input_tokens_seen

        def fresh() -> int:
            """This rank's share of what all ranks have seen since the step before."""
            new = int(state.num_input_tokens_seen) - self._tokens_seen
            self._tokens_seen = int(state.num_input_tokens_seen)
            return new // args.world_size

        return fresh

    def _metrics(self) -> dict[str, float]:
        """The worker's, and MB/s both ways since the log before, as if all synchronisations since
        then had been as large as the last."""
        assert self.worker is not None
        metrics = self.worker.metrics()
        (before, count), now = self._logged, time.monotonic()
        moved = metrics["diloco/last_send_mb"] + metrics["diloco/last_recv_mb"]
        rate = moved * (self.worker.sync_count - count) / max(now - before, 1e-9)
        self._logged = (now, self.worker.sync_count)
        return {**metrics, "diloco/bandwidth": rate}

    def _leave(self) -> None:
        self.stop(submit=False)


def _stepped(optimizer: Optimizer) -> Optimizer:
    """The one whose `step` is a step: Accelerate's wrapper is called for micro batches too, and
    takes no hooks."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _check(args: TrainingArguments, optimizer: Optimizer) -> None:
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        raise SettingsError(
            "DeepSpeed keeps weights of its own, which would overwrite the common ones: train with "
            "DDP or FSDP2"
        )
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if ranks > args.world_size:
        raise SettingsError(
            f"there are {ranks} ranks, and the Trainer trains each by itself (its world size is "
            f"{args.world_size}), so their weights differ. On CPUs set use_cpu=True, which makes "
            "it use DDP"
        )
    if args.load_best_model_at_end:
        raise SettingsError(
            "load_best_model_at_end puts old weights into the model before its last steps are "
            "submitted: turn it off, and load the best checkpoint after training"
        )
