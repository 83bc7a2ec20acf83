"""A manager over in-process peers: what the doors use of one, with failures on the script.

It stands under the real `ManagerPeers`, and heals, counts and votes as the node's script says.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from helpers.peers import InProcessRound, Node
from helpers.steps import lone_step
from torch import Tensor
from torch.distributed import Work

from torchft.collectives import codec_for
from torchft.errors import PhaseError
from torchft.ledger import Ledger
from torchft.manager.listeners import StepListeners
from torchft.manager.step import Step
from torchft.peers import Handle, Place
from torchft.quantization import Codec
from torchft.work import _DummyWork

__all__ = ["InProcessManager"]


class InProcessManager:
    """The members of `torchft.manager.Manager`, and of its parts, that fronts use."""

    def __init__(self, node: Node, *, use_async_quorum: bool = False) -> None:
        self.ledger = Ledger()
        self.described: dict[str, list[str]] = {}
        self.keys: list[str] = []
        self.registered = self.keys
        self.readable = True
        self.reductions: list[int] = []
        """Elements of each all-reduce."""
        self.collected_while_unreadable = False
        self.listened: list[dict[str, Any]] = []
        """What step listeners had compared, each time that it changed."""
        self.once: dict[str, Any] = {}
        """What they had compared once."""
        self._node = node
        self._round: InProcessRound | None = None
        self.listeners = StepListeners()
        self.steps = self.state = self.fingerprint = self  # one object plays all the parts
        self.step_now: Step = lone_step(self.ledger)
        self._step_voted: InProcessStep | None = None
        self._met = False
        self._open = False
        self._begun_early = False
        self._step = 0
        begins_equal = node.joins or node.script.opening
        self.starting_state = SimpleNamespace(add=lambda source: None)
        self.options = SimpleNamespace(sync=not use_async_quorum, init_sync=begins_equal)
        node.register(self.load_state_dict, self.state_dict)

    def state_dict(self) -> dict[str, int]:
        self.collected_while_unreadable |= not self.readable
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step = state["step"]

    def current_step(self) -> int:
        return self._step

    def num_participants(self) -> int:
        return len(self._round.counted) if self._round else 0

    def register_state_dict_fn(
        self, key: str, load: Callable[[Any], None], save: Callable[[], Any]
    ) -> None:
        assert key not in self.keys, f"state {key!r} is registered already"
        self.keys.append(key)
        self._node.register(load, save)

    def offer_copies(self) -> None:
        pass

    def unreadable(self) -> Exception | None:
        return None

    def register_on_disk(self, key: str, load: Any, save: Any) -> None:
        pass

    def describe_model(self, key: str, tensors: list[tuple[str, Tensor]]) -> None:
        self.described[key] = [name for name, _ in tensors]

    def describe_setting(self, name: str, value: str) -> None:
        self.described[name] = [value]

    def _compare(self, always: dict[str, Any], once: dict[str, Any]) -> None:
        self.once |= once
        if not self.listened or always != self.listened[-1]:
            self.listened.append(always)

    def begin_early(self) -> None:
        if not self._open:
            self.start_quorum()
            self._begun_early = True

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def needs_new(self) -> bool:
        return not (self._open and not self.step_now.averages and self.errored() is None)

    @property
    def voted(self) -> InProcessStep | None:
        return None if self._open else self._step_voted

    @property
    def has_met(self) -> bool:
        return self._round is not None

    def disallow_state_dict_read(self) -> None:
        self.readable = False

    def allow_state_dict_read(self) -> None:
        self.readable = True

    def start_quorum(
        self,
        allow_heal: bool = True,
        shrink_only: bool = False,
        timeout: timedelta | None = None,
        place: Place = Place.BEFORE,
    ) -> None:
        if self._open and self._begun_early and not self.needs_new:
            self._begun_early = False
            return
        self._compare(*self.listeners.before_step())
        self._round = self._node.open(place)
        self.step_now = lone_step(self.ledger)
        self._open = True

    def begun(self, what: str) -> InProcessStep:
        assert self._round is not None, f"call start_quorum before {what}"
        return InProcessStep(self, self._round, self.step_now)

    def close(
        self, step: InProcessStep, timeout: timedelta | None = None, *, counts: bool = True
    ) -> bool:
        self._open = self._open and step.round is not self._round
        return step.close() if counts else True

    def fall_behind(self, step: Any = None) -> None:
        self.count(-1)

    # What doors use that run one step at a time.

    def allreduce(
        self, tensor: Tensor, should_quantize: bool | str | Codec = False, name: Any = None
    ) -> Work:
        assert self._open, "call start_quorum before allreduce"
        work = self.begun("it").allreduce(tensor, should_quantize)
        self.step_now.averages.append(work)  # type: ignore[arg-type]
        work.wait()
        return _DummyWork(tensor)

    def report_error(self, e: Exception) -> None:
        self.step_now.report(e)
        self.begun("it").report_error(e)

    def errored(self) -> Exception | None:
        failed = self._round is not None and self._round.failed
        return RuntimeError("the round failed") if failed else None

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        if not self._open:
            raise PhaseError("no step is open")
        self.listeners.before_vote(self.step_now)
        if self.step_now.error is not None:
            self.report_error(self.step_now.error.original_exception)
        self._open = False
        self._step_voted = self.begun("it")
        return self._step_voted.close()

    # What doors use that let several be open.

    def take(self) -> InProcessStep:
        return self.begun("take")

    def take_over(self, **carried: Any) -> InProcessStep:
        return InProcessStep(self, self._node.take_over(carried), self.step_now)

    def count(self, steps: int) -> None:
        self._step += steps


class InProcessStep:
    """The members of `torchft.manager.step.Step` that peers use; `as_step` counts its averages."""

    formed = True

    def __init__(self, manager: InProcessManager, of: InProcessRound, as_step: Step) -> None:
        self.committed: bool | None = None
        self.context, self.averages = as_step.context, as_step.averages
        self.plan = SimpleNamespace(bootstrap=of.bootstrap, final_sync=False)
        self.round = of
        self._manager, self._as_step = manager, as_step

    @property
    def failed(self) -> bool:
        return self.round.failed

    def allreduce(
        self,
        tensor: Tensor,
        should_quantize: bool | str | Codec = False,
        *,
        error_feedback: Tensor | None = None,
        reports: bool = True,
    ) -> Work:
        self._manager.reductions.append(tensor.numel())
        codec = codec_for(should_quantize, tensor.device)
        left = None if error_feedback is None else [error_feedback[None]]
        return _Waited(tensor, self.round.average([tensor[None]], codec, left))

    ordered_mean = allreduce

    def allgather(self, tensor: Tensor) -> tuple[Work, list[Tensor]]:
        (rows,) = self.round.gather([tensor]).wait()
        return _DummyWork(None), list(rows.split(tensor.shape[0]))

    def carried(self) -> dict[str, Any]:
        return self.round.carried()

    def report_error(self, e: Exception) -> None:
        self.round.fail(e)

    def close(self) -> bool:
        self.committed = self.round.close()
        self._manager.count(self.committed)
        return self.committed


class _Waited(_DummyWork):
    """An average that is there when it is waited for."""

    def __init__(self, tensor: Tensor, average: Handle) -> None:
        super().__init__(tensor)
        self._average = average

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._average.wait()
        return True
