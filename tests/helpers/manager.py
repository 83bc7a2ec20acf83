"""A manager over in-process peers: what the doors use of one, with failures on the script.

It stands under the real `ManagedPeers`, and heals, counts and votes as the node's script says.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from helpers.peers import InProcessRound, Node
from torch import Tensor
from torch.distributed import Work

from torchft.collectives import codec_for
from torchft.errors import PhaseError
from torchft.ledger import Ledger
from torchft.manager.listeners import StepListener, StepListeners
from torchft.manager.transaction import Transaction
from torchft.peers import Handle, Place
from torchft.quantization import Codec
from torchft.work import _DummyWork

__all__ = ["InProcessManager"]


class InProcessManager:
    """The members of `torchft.manager.Manager` that doors use."""

    def __init__(self, node: Node, *, use_async_quorum: bool = False) -> None:
        self.ledger = Ledger()
        self.described: dict[str, list[str]] = {}
        self.keys: list[str] = []
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
        self._listeners = StepListeners(self._compare)
        self._transaction = Transaction(self.ledger, lambda _: None)
        self._step_voted: InProcessStep | None = None
        self._met = False
        self._open = False
        self._begun_early = False
        self._step = 0
        self._use_async_quorum = use_async_quorum
        self._init_sync = node.joins or node.script.opening
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

    def describe_model(self, key: str, tensors: list[tuple[str, Tensor]]) -> None:
        self.described[key] = [name for name, _ in tensors]

    def describe_setting(self, name: str, value: str) -> None:
        self.described[name] = [value]

    def add_step_listener(self, listener: StepListener) -> None:
        self._listeners.add(listener)

    def _compare(self, always: dict[str, Any], once: dict[str, Any]) -> None:
        self.once |= once
        if not self.listened or always != self.listened[-1]:
            self.listened.append(always)

    def begin_in_forward(self) -> None:
        if not self._open:
            self.start_quorum()
            self._begun_early = True

    def is_step_open(self) -> bool:
        return self._open

    def needs_new_step(self) -> bool:
        return not (self._open and not self._transaction.averages and self.errored() is None)

    def refuse_unaveraged(self, param_groups: list[dict[str, Any]]) -> None:
        self._listeners.refuse_unaveraged(param_groups, self._transaction)

    def voted_step(self) -> InProcessStep | None:
        return None if self._open else self._step_voted

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
        if self._open and self._begun_early and not self.needs_new_step():
            self._begun_early = False
            return
        self._listeners.before_step()
        self._round = self._node.open(place)
        self._transaction = Transaction(self.ledger, lambda _: None)
        self._open = True

    def is_opening(self) -> bool:
        assert self._round is not None
        return self._round.opening

    def close_opening(self) -> bool:
        self._open = False
        return True

    # What doors use that run one step at a time.

    def allreduce(
        self, tensor: Tensor, should_quantize: bool | str | Codec = False, name: Any = None
    ) -> Work:
        assert self._open, "call start_quorum before allreduce"
        work = self.take_step().allreduce(tensor, should_quantize)
        self._transaction.averages.append(work)  # type: ignore[arg-type]
        work.wait()
        return _DummyWork(tensor)

    def report_error(self, e: Exception) -> None:
        self._transaction.report(e)
        self.take_step().report_error(e)

    def errored(self) -> Exception | None:
        return None if self._round is None else self.take_step().errored()

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        if not self._open:
            raise PhaseError("no step is open")
        self._listeners.before_vote(self._transaction)
        if self._transaction.error is not None:
            self.report_error(self._transaction.error.original_exception)
        self._open = False
        self._step_voted = self.take_step()
        return self._step_voted.should_commit(timeout)

    # What doors use that let several be open.

    def take_step(self) -> InProcessStep:
        assert self._round is not None, "call start_quorum first"
        return InProcessStep(self, self._round)

    def take_over(self, **carried: Any) -> InProcessStep:
        return InProcessStep(self, self._node.take_over(carried))

    def count(self, steps: int) -> None:
        self._step += steps


class InProcessStep:
    """The members of `torchft.manager.open_step.OpenStep` that peers use."""

    def __init__(self, manager: InProcessManager, of: InProcessRound) -> None:
        self.committed: bool | None = None
        self._manager = manager
        self._round = of

    def allreduce(
        self,
        tensor: Tensor,
        should_quantize: bool | str | Codec = False,
        *,
        unsaid: Tensor | None = None,
        reports: bool = True,
    ) -> Work:
        self._manager.reductions.append(tensor.numel())
        codec = codec_for(should_quantize, tensor.device)
        left = None if unsaid is None else [unsaid[None]]
        return _Waited(tensor, self._round.average([tensor[None]], codec, left))

    ordered_mean = allreduce
    check_finite = True

    def allgather(self, tensor: Tensor) -> tuple[Work, list[Tensor]]:
        (rows,) = self._round.gather([tensor]).wait()
        return _DummyWork(None), list(rows.split(tensor.shape[0]))

    def carried(self) -> dict[str, Any]:
        return self._round.carried()

    def report_error(self, e: Exception) -> None:
        self._round.fail(e)

    def errored(self) -> Exception | None:
        return RuntimeError("the round failed") if self._round.failed else None

    def fall_behind(self) -> None:
        self._manager.count(-1)

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        self.committed = self._round.close()
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
