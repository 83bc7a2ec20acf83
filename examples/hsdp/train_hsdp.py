"""HSDP: FSDP2 shards the model over the ranks of a group, and the groups average gradients.

Start a lighthouse, then both groups of two ranks. Kill a rank whenever you like: torchrun starts
its group again, which heals, each rank its own shards.
TORCH_CPP_LOG_LEVEL=ERROR keeps torch's own warnings away.

    torchft_lighthouse --min_replicas 1 --quorum_tick_ms 100 --join_timeout_ms 10000

    cd examples/hsdp && torchx run

or each in a shell of its own, with another number and port:

    TORCHFT_LIGHTHOUSE=http://localhost:29510 REPLICA_GROUP_ID=0 NUM_REPLICA_GROUPS=2 \
        torchrun --master_port=29600 --nnodes=1 --nproc_per_node=2 examples/hsdp/train_hsdp.py
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.script import FinishBarrier, JobRank, at_least, joining, run_script, shared_flags
from torchft.toy.byte_model import ByteCorpus, ByteTransformer, Order, next_byte_loss

STEPS = 2_000  # then it ends; some minutes on a laptop
ROWS = 8  # windows of text in a batch of one rank
LEARNING_RATE = 2e-3  # at first; it falls to zero at the last step
FORGET = 0.05  # of the bytes that a rank reads become zero, at random
FINISH_TOGETHER_S = 60  # a group that is away at the end is waited for so long
MIN_GROUPS = 1  # with fewer groups than this, steps are discarded
TIMEOUT = timedelta(seconds=30)  # of what groups wait for; ranks of a group wait longer
SAY_EVERY = 20  # steps
SEED = 0


def main() -> None:
    arguments = command_line()
    job = JobRank.join(TIMEOUT)
    torch.set_num_threads(1)

    # The group's ranks share one model, cut in the way in which FSDP2's users cut it.
    torch.manual_seed(SEED)
    model = ByteTransformer()
    mesh = init_device_mesh("cpu", (job.ranks,), mesh_dim_names=("fsdp",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = CosineAnnealingLR(adamw, T_max=arguments.steps)

    # Each rank of each group reads a shard of its own, at the position that the step tells.
    corpus = ByteCorpus.load(arguments.corpus)
    context = model.shape.context
    order = Order(windows=corpus.windows(context), shards=job.shards, rows=ROWS, seed=SEED)

    # From here on the other groups know of this one. All that is registered heals.
    with joining():
        manager = Manager(
            pg=ProcessGroupGloo(timeout=TIMEOUT),
            load_state_dict=None,
            state_dict=None,
            min_replica_size=MIN_GROUPS,
            use_async_quorum=False,
            timeout=TIMEOUT,
            connect_timeout=TIMEOUT,
            replica_id=f"group_{job.group}",
        )
    try:
        barrier = FinishBarrier(
            steps=arguments.steps, groups=job.groups, patience_s=arguments.finish_together_s
        )
        random = torch.default_generator
        manager.register(
            model=model, optimizer=adamw, schedule=schedule, random=random, together=barrier
        )
        ddp = DistributedDataParallel(manager, model)
        optimizer = Optimizer(manager, adamw)
        while not barrier.reached:
            optimizer.zero_grad()  # begin: who is there? who heals, and from whom?
            batch = order.batch(manager.current_step(), shard=job.shard)
            inputs, targets = corpus.batch(batch, context=context)
            inputs = inputs.masked_fill(torch.rand(inputs.shape) < FORGET, 0)
            loss = next_byte_loss(ddp, inputs, targets)
            loss.backward()  # reduce inside the group, then average each rank's shards
            committed = optimizer.step()  # vote: the step is taken, or discarded
            step, there = manager.current_step(), manager.num_participants()
            if not committed:
                say(job, f"step {step + 1} is discarded and tried again")
                continue
            schedule.step()
            for news in barrier.committed(step, there):
                say(job, news)
            if step % SAY_EVERY == 0:
                say(job, f"step {step}, {there} of {job.groups} groups, loss {loss.item():.4f}")
        manager.final_sync()  # whoever missed the last step heals from the others
        digest = manager.registered.digest_shared()
        say(job, f"step {manager.current_step()}, digest of all that heals: {digest}")
    finally:
        manager.shutdown()


def command_line() -> argparse.Namespace:
    parser = shared_flags(__doc__, finish_together_s=FINISH_TOGETHER_S)
    parser.add_argument(
        "--steps", type=at_least(1), default=STEPS, metavar="N", help=f"to be committed ({STEPS})"
    )
    return parser.parse_args()


def say(job: JobRank, text: str) -> None:
    print(f"HSDP: rank {job.rank}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, "train_hsdp.py"))
