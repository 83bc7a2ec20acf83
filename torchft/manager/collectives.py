"""What a step sends to the other groups, and how each of it belongs to the step.

A group that is not counted takes part with zeros, so that every member runs the same collectives.
After an error nothing more is sent. The vote finishes whatever is still under way.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import ReduceOp, Work
from torch.distributed.distributed_c10d import AllgatherOptions

from torchft.collectives import OrderedMean, QuantizedMean, adds, as_bytes
from torchft.ledger import Bucket
from torchft.manager.average import Average, Done, Name
from torchft.manager.plan import Plan
from torchft.manager.transaction import Transaction
from torchft.process_group import ProcessGroup
from torchft.process_group.account import paid_by

if TYPE_CHECKING:
    from torchft.quantization import Codec

__all__ = ["Communicator"]


class Communicator:
    """The managed operations of one process group, each with a deadline of `timeout`, whatever that
    of the process group is. `check_finite`: averages and sums are judged.

    One with a `name` discards the step by itself where it has NaN or infinity in it.
    """

    def __init__(
        self, pg: ProcessGroup, *, timeout: timedelta | None = None, check_finite: bool = True
    ) -> None:
        self._pg = pg
        self._timeout = timeout
        self.check_finite = check_finite

    def reduce(
        self,
        transaction: Transaction,
        tensor: torch.Tensor,
        reduce_op: ReduceOp.RedOpType,
        name: Name | None = None,
    ) -> Work:
        """Reduce over the counted groups, in place. AVG is a sum and a division.

        A maximum or minimum is not judged: an infinity in it is most often meant.

        Raises:
            ValueError: an average of integers is asked for.
        """
        average = reduce_op == ReduceOp.AVG
        if average and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"AVG needs a floating-point tensor, not {tensor.dtype}: use SUM")
        plan = transaction.wait_formed()
        if transaction.broken or plan.settling:
            return Done(tensor)
        if not plan.participates:
            tensor.zero_()
        if average:
            return self._sum(
                transaction, tensor, ReduceOp.SUM, len(plan.counted), judged=True, name=name
            )
        judged = reduce_op == ReduceOp.SUM
        return self._sum(transaction, tensor, reduce_op, 1, judged=judged, name=name)

    def ordered_mean(
        self, transaction: Transaction, tensor: torch.Tensor, name: Name | None = None
    ) -> Work:
        """The mean over the counted groups, in place, added in the order of the members."""
        plan = transaction.wait_formed()
        if transaction.broken or plan.settling:
            return Done(tensor)
        try:
            with paid_by(transaction.account):
                work = OrderedMean(self._pg, tensor, plan.counted)
        except Exception as error:
            transaction.report(error)
            return Done(tensor)
        return self._managed(transaction, work, tensor, judged=True, name=name)

    def quantized(
        self,
        transaction: Transaction,
        tensor: torch.Tensor,
        codec: Codec,
        reduce_op: ReduceOp.RedOpType,
        unsaid: torch.Tensor | None = None,
        name: Name | None = None,
    ) -> Work:
        """The mean over the counted groups, or their sum, in place, of encoded numbers."""
        summed = adds(reduce_op)
        codec.check(tensor.dtype)
        plan = transaction.wait_formed()
        if transaction.broken or plan.settling:
            return Done(tensor)
        try:
            with paid_by(transaction.account):
                work = QuantizedMean(
                    self._pg, tensor, plan.counted, codec, summed=summed, unsaid=unsaid
                )
        except Exception as error:
            transaction.report(error)
            return Done(tensor)
        return self._managed(transaction, work, tensor, judged=True, name=name)

    def gather(
        self, transaction: Transaction, tensor: torch.Tensor
    ) -> tuple[Work, list[torch.Tensor]]:
        """The counted groups' tensors, in counted order."""
        plan = transaction.wait_formed()
        if not (transaction.broken or plan.settling):
            sent = tensor.contiguous()
            rows = [torch.empty_like(sent) for _ in plan.members]
            # As bytes: gloo knows neither int16 nor bool.
            wire = [as_bytes(row) for row in rows]
            try:
                with paid_by(transaction.account):
                    work = self._pg.allgather([wire], [as_bytes(sent)], AllgatherOptions())
            except Exception as error:
                transaction.report(error)
            else:
                gathered = self._managed(transaction, work, tensor)
                return gathered, [rows[rank] for rank in plan.counted]
        return Done(tensor), [tensor] * len(plan.counted)

    def finish(self, transaction: Transaction, plan: Plan, timeout: timedelta) -> None:
        """Wait for all that is under way; a failure is the step's error."""
        if plan.anyone_heals and not transaction.averages and not transaction.broken:
            # Nothing was averaged, so nothing has shown that who heals has got its state.
            self._sum(
                transaction, torch.zeros(1, dtype=torch.float32, device="cpu"), ReduceOp.SUM, 1
            )
        with transaction.ledger.spending(Bucket.COMMUNICATE):
            for average in transaction.averages:
                average.wait(timeout)
                average.report()
            if torch.cuda.is_initialized():
                torch.cuda.current_stream().synchronize()
        error = transaction.group_error()
        if error is not None and (not transaction.failed or transaction.not_finite):
            transaction.report(error)

    def _sum(
        self,
        transaction: Transaction,
        tensor: torch.Tensor,
        reduce_op: ReduceOp.RedOpType,
        divisor: int,
        *,
        judged: bool = False,
        name: Name | None = None,
    ) -> Work:
        # Backends take a tensor for one piece of memory, also where it has gaps.
        sent = tensor.contiguous()
        try:
            with paid_by(transaction.account):
                work = self._pg.allreduce([sent], reduce_op)
        except Exception as error:
            transaction.report(error)
            return Done(tensor)
        return self._managed(
            transaction, work, tensor, divisor, sent=sent, judged=judged, name=name
        )

    def _managed(
        self,
        transaction: Transaction,
        work: Work,
        tensor: torch.Tensor,
        divisor: int = 1,
        *,
        sent: torch.Tensor | None = None,
        judged: bool = False,
        name: Name | None = None,
    ) -> Average:
        managed = Average(
            transaction,
            work,
            tensor,
            divisor,
            transaction.generation,
            sent=sent,
            judged=judged and self.check_finite,
            name=name,
            timeout=self._timeout,
        )
        transaction.averages.append(managed)
        return managed
