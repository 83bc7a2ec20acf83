"""A run: what is known once the first worker has registered; made anew or of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.parameter_server.core.dylu import local_steps
from torchft.parameter_server.core.options import OuterOptions, ServerOptions, SharedSettings
from torchft.parameter_server.core.requests import Registration
from torchft.parameter_server.core.rounds import RoundClosed, Rounds
from torchft.parameter_server.core.rules import Departure
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.server.journal import closed_of
from torchft.parameter_server.server.model_files import files_of, read_model, rows_of_model
from torchft.parameter_server.server.state_records import Replay, replay_of
from torchft.parameter_server.server.storage import Storage
from torchft.parameter_server.server.weights import FlatRow, ServerWeights
from torchft.quantization import codec_of
from torchft.strategies.local import Fragment

__all__ = ["RunFactory", "TrainingRun"]

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """Changes on the event loop alone, but for `state`'s own thread."""

    agreed: SharedSettings
    shape: ModelShape
    rounds: Rounds
    weights: ServerWeights | None
    """None: the first weights are still to come."""
    outer: OuterOptions
    """As it is for the rounds that close now: orders change it."""
    extras: dict[str, Tensor]
    """Tensors of the starting model that nobody trains; they go into checkpoints as they are."""
    expected: dict[str, Any] | None = None
    """The order that changed how many workers are expected, if one did: `Rules.order`."""

    @property
    def versions(self) -> list[int]:
        """Of each fragment."""
        return [one.version for one in self.rounds.rounds]

    @property
    def pending(self) -> list[str]:
        """The uploads of open rounds."""
        return [s.upload for one in self.rounds.rounds for s in one.pending]

    def steps_for(self, worker: str, options: ServerOptions) -> int:
        """Inner steps that a worker should take between two submissions."""
        if not options.dylu:
            return self.agreed.sync_every
        base = options.dylu_base_sync_every or self.agreed.sync_every
        speeds = {name: member.steps_per_s for name, member in self.rounds.members.items()}
        return local_steps(base, speeds, worker)

    def decided(self) -> dict[str, Any]:
        """What a checkpoint of now says; steps that are decided may still have to be taken."""
        return {
            "rounds": self.rounds.state_dict(),
            "optimizer": self.decided_outer,
            "expected": self.expected,
        }

    @property
    def decided_outer(self) -> dict[str, float]:
        """What an order can change."""
        return {"lr": self.outer.lr, "momentum": self.outer.momentum}

    def saved(self, decided: dict[str, Any]) -> dict[str, Any]:
        """All that a restart needs; `decided` is of when it was decided to save."""
        assert self.weights is not None
        return {
            "model": self.shape.to_json(),
            "agreed": self.agreed.to_json(),
            "extras": self.extras,
            **decided,
            **self.weights.state_dict(),
        }

    def model(self) -> dict[str, Tensor]:
        """The weights in the model's own dtypes, with what nobody trains."""
        assert self.weights is not None
        kinds = {p.name: getattr(torch, p.dtype) for p in self.shape.parameters}
        trained = {n: tensor.to(kinds[n]) for n, tensor in self.weights.by_name().items()}
        return {**self.extras, **trained}


class RunFactory:
    """Makes them, for one server."""

    def __init__(
        self, options: ServerOptions, storage: Storage, clock: Callable[[], float]
    ) -> None:
        self._options, self._storage, self._clock = options, storage, clock

    def warm_up(self) -> None:
        """Torch loads much for its first optimizer: no worker should wait for that."""
        outer = self._options.outer.build(self._options.rules)
        outer.bind(
            [Fragment(0, (0,))], [FlatRow([torch.zeros(1, 1, dtype=torch.float32, device="cpu")])]
        )

    def weights(
        self,
        shape: ModelShape,
        agreed: SharedSettings,
        rows: list[Tensor],
        at: list[int] | None = None,
        outer: OuterOptions | None = None,
    ) -> ServerWeights:
        """Over `rows`, which belong to it from now on."""
        step = (outer or self._options.outer).build(self._options.rules)
        return ServerWeights(shape, codec_of(agreed.codec), step, rows, self._storage.updates, at)

    def begun(self, request: Registration) -> TrainingRun:
        """The first worker fixes what the server's settings leave open.

        Raises:
            MismatchError, SettingsError: its model or its wishes cannot be.
        """
        agreed = self._options.agree(request.wished)
        shape = request.shape.cut(agreed.fragments)
        rounds = Rounds(self._options.rules, agreed.fragments)
        run = TrainingRun(agreed, shape, rounds, None, self._options.outer, {})
        if self._options.model is not None:
            tensors = read_model(self._options.model)
            run.weights = self.weights(shape, agreed, rows_of_model(shape, tensors))
            trained = {parameter.name for parameter in shape.parameters}
            run.extras = {n: tensor for n, tensor in tensors.items() if n not in trained}
        return run

    def restored(self) -> TrainingRun | None:
        """Of the newest good checkpoint and what happened after it; None: there is none.

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
        whole = self._redo(run, number) if follows else False
        whole = self._lose_damaged(run) and whole
        if not whole and self._options.save_every:
            self._save(run)  # what happens from here on has to follow something
            self._storage.records.clear()
        self._storage.delete_all_but(run.pending)
        logger.info("going on from checkpoint %d at versions %s", number, run.versions)
        return run

    def _of(self, saved: Mapping[str, Any]) -> TrainingRun:
        shape, agreed = ModelShape.from_json(saved["model"]), SharedSettings(**saved["agreed"])
        for difference in self._options.differences(agreed):
            logger.warning("the run goes on with its own settings: %s of the flags", difference)
        rounds = Rounds(self._options.rules, len(shape.fragments))
        rounds.load_state_dict(saved["rounds"], self._clock())
        rows = saved["rows"]
        weights, versions = [r["weights"] for r in rows], [r["version"] for r in rows]
        outer = self._outer_of(saved)
        held = self.weights(shape, agreed, weights, versions, outer)
        try:
            held.load_outer({"rows": rows})
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"the checkpoint is of another outer optimizer ({error}): start with the flags "
                "that it was made with"
            ) from None
        run = TrainingRun(agreed, shape, rounds, held, outer, saved["extras"])
        if expected := saved.get("expected"):
            self._expect(run, expected)
        return run

    def _expect(self, run: TrainingRun, expected: dict[str, Any]) -> None:
        """An order holds after a restart with the same flags; others win over it."""
        rules = self._options.rules
        if expected["flags"] == [rules.workers, rules.min_workers]:
            run.expected = expected
            run.rounds.redo_expect(*expected["order"])
            logger.warning(
                "the run goes on with %d workers, at least %d, as it was ordered",
                *expected["order"],
            )

    def _outer_of(self, saved: Mapping[str, Any]) -> OuterOptions:
        """The run's own, which an order may have changed; not what the flags say."""
        flags = self._options.outer
        outer = flags.changed(**saved["optimizer"])
        if outer != flags:
            logger.warning(
                "the run goes on with its outer lr %g and momentum %g, not with %g and %g of the "
                "flags: the order update_optimizer changes them",
                *(outer.lr, outer.momentum, flags.lr, flags.momentum),
            )
        return outer

    def _save(self, run: TrainingRun) -> None:
        number, spent = self._storage.begin()
        self._storage.write(number, run.saved(run.decided()), run.model())
        self._storage.end(number, spent)

    def _lose_damaged(self, run: TrainingRun) -> bool:
        """Uploads are not forced to disk: after a power failure one may be gone. Returns whether
        none of an open round is."""
        pending = [s for one in run.rounds.rounds for s in one.pending]
        lost = [s for s in pending if not self._is_there(run, s)]
        for submission in reversed(lost):
            logger.warning("the work of %s that was pending is lost", submission.worker)
            run.rounds.lose(submission)
        return not lost

    def _is_there(self, run: TrainingRun, submission: Submission) -> bool:
        assert run.weights is not None
        chunks = run.weights.chunks(submission.fragment)
        return chunks.are_whole(self._storage.upload(submission.upload))

    def _redo(self, run: TrainingRun, number: int) -> bool:
        """What happened after the checkpoint happens again, as far as its numbers are known.
        Returns whether all of them were in the uploads."""
        events = list(self._storage.journal.after(number))
        closes = [closed_of(event) for kind, event in events if kind == "close"]
        fragments = range(len(run.shape.fragments))
        ways = [self._way(run, f, [c for c in closes if c.fragment == f]) for f in fragments]
        for kind, event in events:
            if kind == "close":
                close = closed_of(event)
                self._redo_close(run, close, ways[close.fragment])
            else:
                self._redo_one(run, kind, event)
        return all(way == Replay() for way in ways)

    def _way(self, run: TrainingRun, fragment: int, closes: list[RoundClosed]) -> Replay:
        """How these, which are all of `fragment`, are done again."""
        lost = {
            close.version
            for close in closes
            if not all(self._is_there(run, share.submission) for share in close.shares)
        }
        if not lost:
            return Replay()
        assert run.weights is not None
        found = self._storage.records.find(closes, run.weights.chunks(fragment).count)
        way = replay_of(closes, lost, found)
        logger.warning(
            "an upload that made version %d of fragment %d is lost or damaged: it goes on from %s",
            *(min(lost), fragment, way),
        )
        return way

    def _redo_close(self, run: TrainingRun, close: RoundClosed, way: Replay) -> None:
        """What came in for one that is not done counts in the next round."""
        if way.stop is not None and close.version >= way.stop.version:
            return
        assert run.weights is not None
        run.rounds.redo_close(close)
        if way.record is None or close.version > way.record.version:
            run.weights.apply(close, self._storage.upload)
        elif close == way.record and way.path is not None:
            pieces = self._storage.records.read(way.path)
            run.weights.load_pieces(close.fragment, close.version, pieces)
        self._storage.spend(close)

    def _redo_one(self, run: TrainingRun, kind: str, event: dict[str, Any]) -> None:
        assert run.weights is not None
        if kind == "join":
            session, beat_s = event["session"], event["beat_s"]
            run.rounds.redo_join(self._clock(), event["worker"], session, beat_s)
        elif kind == "gone":
            run.rounds.redo_leave(event["worker"], Departure[event["why"]])
        elif kind == "take":
            run.rounds.redo_take(Submission(**event))
        elif kind == "expect":
            self._expect(run, event)
        elif kind == "optimizer":
            run.outer = run.outer.changed(**event)
            run.weights.outer.change(**run.outer.settings)
