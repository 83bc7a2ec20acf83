"""What a step sends to the other groups, and how each of it belongs to the step.

A group that does not participate sends zeros, so that every member runs the same collectives. After
an error nothing more is sent. The vote finishes whatever is still under way.

Each has the manager's timeout as its deadline, whatever that of the process group is. Averages and
sums are judged with `check_finite`: one with a `name` discards its step by itself where it has NaN
or infinity in it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import ReduceOp, Work
from torch.distributed.distributed_c10d import AllgatherOptions

from torchft.collectives import OrderedMean, QuantizedMean, adds, as_bytes, codec_for
from torchft.devices import finish_current_stream, is_lost
from torchft.errors import IntegerAverageError, SettingsError
from torchft.ledger import Bucket
from torchft.manager.average import Average, Done, Name
from torchft.process_group.account import paid_by

if TYPE_CHECKING:
    from torchft.manager.step import Step
    from torchft.quantization import Codec

__all__ = ["allreduce", "finish", "gather", "ordered_mean"]


def allreduce(
    step: Step,
    tensor: torch.Tensor,
    should_quantize: bool | str | Codec,
    reduce_op: ReduceOp.RedOpType,
    error_feedback: torch.Tensor | None = None,
    name: Name | None = None,
    reports: bool = True,
) -> Work:
    """Reduce over the participating groups, in place, as it is or encoded by a codec.

    AVG is a sum and a division. A maximum or minimum is not judged: an infinity in it is most
    often meant.

    Raises:
        SettingsError: a sparse tensor, an error-feedback buffer without a codec, or a codec that
            cannot hold the dtype.
        IntegerAverageError: AVG of a tensor that is neither floating-point nor complex.
    """
    _refuse_sparse("allreduce", tensor)
    codec = codec_for(should_quantize, tensor.device)
    name = (name or _by_shape) if reports else None
    if codec is not None:
        summed = adds(reduce_op)
        codec.check(tensor.dtype)
        return _combined(
            step,
            tensor,
            name,
            lambda pg, ranks: QuantizedMean(
                pg, tensor, ranks, codec, summed=summed, error_feedback=error_feedback
            ),
        )
    if error_feedback is not None:
        raise SettingsError("all of a tensor arrives as it is: error_feedback goes with a codec")
    average = reduce_op == ReduceOp.AVG
    if average and not (tensor.is_floating_point() or tensor.is_complex()):
        raise IntegerAverageError(f"AVG needs a floating-point tensor, not {tensor.dtype}: use SUM")
    plan = step.plan
    if step.broken or plan.final_sync:
        return Done(tensor)
    if not plan.participates:
        tensor.zero_()
    if average:
        return _reduce(step, tensor, ReduceOp.SUM, len(plan.participating), True, name)
    return _reduce(step, tensor, reduce_op, 1, reduce_op == ReduceOp.SUM, name)


def ordered_mean(step: Step, tensor: torch.Tensor, reports: bool = True) -> Work:
    """Average over the participating groups, in place, added in the order of the members.

    Raises:
        SettingsError: a sparse tensor.
    """
    _refuse_sparse("ordered_mean", tensor)
    name = _by_shape if reports else None
    return _combined(step, tensor, name, lambda pg, ranks: OrderedMean(pg, tensor, ranks))


def gather(step: Step, tensor: torch.Tensor) -> tuple[Work, list[torch.Tensor]]:
    """Gather the participating groups' tensors, in the order of their ranks.

    Raises:
        SettingsError: a sparse tensor.
    """
    _refuse_sparse("allgather", tensor)
    plan = step.plan
    if not (step.broken or plan.final_sync):
        sent = tensor.contiguous()
        rows = [torch.empty_like(sent) for _ in plan.members]
        # As bytes: gloo knows neither int16 nor bool.
        wire = [as_bytes(row) for row in rows]
        work = _started(step, lambda pg: pg.allgather([wire], [as_bytes(sent)], AllgatherOptions()))
        if work is not None:
            return _managed(step, work, tensor), [rows[rank] for rank in plan.participating]
    return Done(tensor), [tensor] * len(plan.participating)


def finish(step: Step, timeout: timedelta) -> None:
    """Wait for all that is under way in the step; a failure is the step's error, also that of a
    device, on which whatever is asked next fails."""
    try:
        _finish(step, timeout)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        step.report(error)


def _finish(step: Step, timeout: timedelta) -> None:
    if step.plan.anyone_heals and not step.averages and not step.broken:
        # Nothing was averaged, so nothing has shown that who heals has got its state.
        _reduce(
            step,
            torch.zeros(1, dtype=torch.float32, device=step.context.group.device),
            ReduceOp.SUM,
        )
    with step.ledger.spending(Bucket.COMMUNICATE):
        for average in step.averages:
            average.wait(timeout)
            average.report()
        finish_current_stream()
    # What was taken over from a donor has no process group here.
    error = None if step.detached else step.context.group.error_of(step.generation)
    if error is not None and (not step.failed or step.not_finite):
        step.report(error)


def _combined(
    step: Step, tensor: torch.Tensor, name: Name | None, start: Callable[..., Work]
) -> Work:
    """A mean that the members combine themselves, from what each of them sends."""
    plan = step.plan
    if step.broken or plan.final_sync:
        return Done(tensor)
    work = _started(step, lambda pg: start(pg, plan.participating))
    return Done(tensor) if work is None else _managed(step, work, tensor, judged=True, name=name)


def _reduce(
    step: Step,
    tensor: torch.Tensor,
    reduce_op: ReduceOp.RedOpType,
    divisor: int = 1,
    judged: bool = False,
    name: Name | None = None,
) -> Work:
    # Backends take a tensor for one piece of memory, also where it has gaps.
    sent = tensor.contiguous()
    work = _started(step, lambda pg: pg.allreduce([sent], reduce_op))
    if work is None:
        return Done(tensor)
    return _managed(step, work, tensor, divisor, sent=sent, judged=judged, name=name)


def _started(step: Step, start: Callable[..., Work]) -> Work | None:
    """The operation under way; None when it cannot begin, which is the step's error."""
    try:
        with paid_by(step.account):
            return start(step.context.group.pg)
    except Exception as error:
        step.report(error)
        return None


def _managed(
    step: Step,
    work: Work,
    tensor: torch.Tensor,
    divisor: int = 1,
    *,
    sent: torch.Tensor | None = None,
    judged: bool = False,
    name: Name | None = None,
) -> Average:
    options = step.context.options
    average = Average(
        step,
        work,
        tensor,
        divisor,
        step.generation,
        sent=sent,
        judged=judged and options.check_finite,
        name=name,
        timeout=options.timeout,
    )
    step.averages.append(average)
    return average


def _by_shape(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"a tensor of shape {list(tensor.shape)}": tensor}


def _refuse_sparse(what: str, tensor: torch.Tensor) -> None:
    """Backends take a tensor for one piece of memory."""
    if tensor.layout is not torch.strided:
        raise SettingsError(
            f"{what} of a sparse tensor of shape {tuple(tensor.shape)}: give tensor.to_dense(), "
            "or make the nn.Embedding whose gradient it is with sparse=False"
        )
