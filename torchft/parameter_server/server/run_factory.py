"""Makes the run of a server: anew for the first worker, or from a checkpoint and its journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.parameter_server.core.events import (
    Event,
    RoundClosed,
    WorkersExpected,
    event_from_json,
)
from torchft.parameter_server.core.options import OuterOptions, ServerOptions, SharedSettings
from torchft.parameter_server.core.requests import Registration
from torchft.parameter_server.core.rounds import Rounds
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.server.model_files import files_of, read_model, rows_of_model
from torchft.parameter_server.server.state_records import Replay, replay_of
from torchft.parameter_server.server.storage import Storage
from torchft.parameter_server.server.training_run import TrainingRun
from torchft.parameter_server.server.weights import FlatRow, ServerWeights
from torchft.quantization import codec_of
from torchft.strategies.local import Fragment

__all__ = ["RunFactory"]

logger = logging.getLogger(__name__)


class RunFactory:
    """Makes the run of one server, which has one at a time."""

    def __init__(
        self, options: ServerOptions, storage: Storage, clock: Callable[[], float]
    ) -> None:
        self._options, self._storage, self._clock = options, storage, clock

    def warm_up(self) -> None:
        """Make an outer optimizer: torch loads much for its first one, and no worker should wait
        for that."""
        outer = self._options.outer_optimizer.build(self._options.rules)
        row = FlatRow([torch.zeros(1, 1, dtype=torch.float32, device="cpu")])
        outer.bind([Fragment(0, (0,))], [row])

    def weights(
        self,
        run: TrainingRun,
        rows: list[Tensor],
        versions: list[int] | None = None,
    ) -> ServerWeights:
        """The shared weights over `rows`, fp32 `[1, n]` a fragment, which belong to them then."""
        step, codec = run.outer.build(self._options.rules), codec_of(run.agreed.codec)
        return ServerWeights(run.shape, codec, step, rows, self._storage.updates, versions)

    def begun(self, request: Registration) -> TrainingRun:
        """A new run; the first worker fixes what the server's settings leave open.

        Raises:
            MismatchError, SettingsError: its model or its wishes cannot be.
        """
        agreed = self._options.agree(request.wished)
        shape = request.shape.cut(agreed.fragments)
        rounds = Rounds(self._options.rules, agreed.fragments)
        run = TrainingRun(agreed, shape, rounds, self._options.outer_optimizer)
        if self._options.model is not None:
            tensors = read_model(self._options.model)
            run.weights_or_none = self.weights(run, rows_of_model(shape, tensors))
            trained = {parameter.name for parameter in shape.parameters}
            run.extras = {n: tensor for n, tensor in tensors.items() if n not in trained}
        return run

    def restored(self) -> TrainingRun | None:
        """The run of the newest good checkpoint and of what happened after it; None where there is
        no checkpoint.

        Raises:
            SettingsError: what is there cannot be gone on from.
        """
        saved, model = self._storage.open(), self._options.model
        if saved is None:
            if model is not None:
                files_of(model)  # better now than when the first worker comes
            return None
        number, state, follows = saved
        if model is not None:
            logger.warning(
                "the run goes on from its checkpoint %d, and the model in %s is not read: give "
                "another -o to begin with it",
                *(number, model),
            )
        run = self._of(state)
        complete = follows and self._replay(run, number)
        pending = [s for one in run.rounds.rounds for s in one.pending]
        lost = [s for s in pending if not self._is_there(run, s)]
        for submission in reversed(lost):
            logger.warning("the work of %s that was pending is lost", submission.worker)
            run.rounds.lose(submission)
        if (lost or not complete) and self._options.save_every:
            with self._storage.checkpoint() as new:
                self._storage.checkpoints.save(new, run.saved(run.decided()), run.model())
            self._storage.records.clear()  # what happens from here on follows that checkpoint
        self._storage.delete_all_but(s.upload for s in pending if s not in lost)
        logger.info("going on from checkpoint %d at versions %s", number, run.versions)
        return run

    def _of(self, saved: Mapping[str, Any]) -> TrainingRun:
        shape, agreed = ModelShape.from_json(saved["model"]), SharedSettings(**saved["agreed"])
        for difference in agreed.differences(self._options.fixed):
            logger.warning("the run goes on with its own settings: %s of the flags", difference)
        rounds = Rounds(self._options.rules, len(shape.fragments))
        rounds.load_state_dict(saved["rounds"], self._clock())
        run = TrainingRun(agreed, shape, rounds, self._outer_of(saved), extras=saved["extras"])
        rows = saved["rows"]
        versions = [row["version"] for row in rows]
        run.weights_or_none = self.weights(run, [row["weights"] for row in rows], versions)
        try:
            run.weights.load_outer({"rows": rows})
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"the checkpoint is of another outer optimizer ({error}): start with the flags "
                "that it was made with"
            ) from None
        if saved.get("expected"):
            self._replay_one(run, event_from_json(WorkersExpected.kind, saved["expected"]))
        return run

    def _outer_of(self, saved: Mapping[str, Any]) -> OuterOptions:
        """The run's own, which an order may have changed; not what the flags say."""
        flags = self._options.outer_optimizer
        outer = flags.changed(**saved["optimizer"])
        if outer != flags:
            logger.warning(
                "the run goes on with its outer lr %g and momentum %g, not with %g and %g of the "
                "flags: the order update_optimizer changes them",
                *(outer.lr, outer.momentum, flags.lr, flags.momentum),
            )
        return outer

    # ------------------------------------------------------------------ the journal

    def _is_there(self, run: TrainingRun, submission: Submission) -> bool:
        """Uploads are not forced to disk: after a power failure one may be gone, or damaged."""
        chunks = run.weights.chunks(submission.fragment)
        return chunks.are_complete(self._storage.upload(submission.upload))

    def _replay(self, run: TrainingRun, number: int) -> bool:
        """Replay what happened after the checkpoint, as far as its numbers are known. Returns
        whether all of them were in the uploads."""
        events = list(self._storage.journal.after(number))
        closes = [event for event in events if isinstance(event, RoundClosed)]
        ways = [
            self._way(run, index, [close for close in closes if close.fragment == index])
            for index in range(len(run.shape.fragments))
        ]
        for event in events:
            if isinstance(event, RoundClosed):
                self._replay_close(run, event, ways[event.fragment])
            else:
                self._replay_one(run, event)
        for member in run.rounds.members.values():
            member.forget_pace()
        return all(way == Replay() for way in ways)

    def _way(self, run: TrainingRun, fragment: int, closes: list[RoundClosed]) -> Replay:
        """How these, which are all of `fragment`, are replayed."""
        lost = {
            close.version
            for close in closes
            if not all(self._is_there(run, share.submission) for share in close.shares)
        }
        if not lost:
            return Replay()
        found = self._storage.records.find(closes, run.weights.chunks(fragment).count)
        way = replay_of(lost, found)
        logger.warning(
            "an upload that made version %d of fragment %d is lost or damaged: it goes on from %s",
            *(min(lost), fragment, way),
        )
        return way

    def _replay_close(self, run: TrainingRun, close: RoundClosed, way: Replay) -> None:
        """What came in for one that is not replayed counts in the next round."""
        if way.stop is not None and close.version >= way.stop:
            return
        run.apply(self._clock(), close)
        if close.version > way.record:
            run.carry_out(close, self._storage.upload)
        elif close.version == way.record and way.path is not None:
            pieces = self._storage.records.read(way.path)
            run.weights.load_pieces(close.fragment, close.version, pieces)
        self._storage.spend(close)

    def _replay_one(self, run: TrainingRun, event: Event) -> None:
        if isinstance(event, WorkersExpected):
            rules = self._options.rules
            if event.flags != [rules.workers, rules.min_workers]:
                return  # other flags win over an order
            logger.warning(
                "the run goes on with %d workers, at least %d, as it was ordered", *event.order
            )
        run.apply(self._clock(), event)
        run.carry_out(event, self._storage.upload)
