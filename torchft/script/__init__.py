"""What a training script that is started by torchrun needs besides a manager.

It reads which group and rank it is, parses flags, says plainly what is wrong, and ends together
with the other groups. The examples in `examples/ddp`, `diloco` and `hsdp` are built of it:

    def main() -> None:
        arguments = shared_flags(__doc__, finish_together_s=60).parse_args()
        job = JobRank.join(timeout)
        with joining():
            manager = Manager(...)
        barrier = FinishBarrier(steps=1000, groups=job.groups, patience_s=60)
        while not barrier.reached:
            ...

    sys.exit(run_script(main, "train.py"))
"""

from torchft.arguments import at_least
from torchft.script.command import joining, run_script, shared_flags
from torchft.script.finish_barrier import FinishBarrier
from torchft.script.ranks import JobRank, average_inside

__all__ = [
    "FinishBarrier",
    "JobRank",
    "at_least",
    "average_inside",
    "joining",
    "run_script",
    "shared_flags",
]
