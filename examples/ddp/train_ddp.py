"""Fault-tolerant DDP: replica groups average their gradients in every step.

Start a lighthouse, then this script in as many shells as there are groups, each with a number of
its own. Kill one whenever you like, watch the others go on, start it again: it heals.
TORCH_CPP_LOG_LEVEL=ERROR keeps torch's own warnings away.
`minimal_ddp.py` does it with DistributedDataParallel and Optimizer, as existing torchft scripts do.

    torchft_lighthouse --min_replicas 1 --quorum_tick_ms 100 --join_timeout_ms 10000

    TORCHFT_LIGHTHOUSE=http://localhost:29510 REPLICA_GROUP_ID=0 NUM_REPLICA_GROUPS=2 \
        torchrun --master_port=29600 --nnodes=1 --nproc_per_node=1 examples/ddp/train_ddp.py
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta

import torch

from torchft import Manager, ProcessGroupGloo, Replicated
from torchft.digest import digest
from torchft.script import (
    FinishBarrier,
    JobRank,
    at_least,
    average_inside,
    joining,
    run_script,
    shared_flags,
)
from torchft.strategies import OptimSpec, SimpleReduceStrategy
from torchft.toy.byte_model import ByteCorpus, ByteTransformer, Order, next_byte_loss

STEPS = 10_000  # then it ends; some minutes on a laptop
ROWS = 8  # windows of text in a batch
ADAMW = OptimSpec(torch.optim.AdamW, lr=2e-3)
FINISH_TOGETHER_S = 60  # a group that is away at the end is waited for so long
MIN_GROUPS = 1  # with fewer groups than this, steps are discarded
TIMEOUT = timedelta(seconds=30)  # of what groups wait for; ranks of a group wait longer
SAY_EVERY = 20  # steps
SEED = 0


def main() -> None:
    arguments = command_line()
    job = JobRank.join(TIMEOUT)  # a group may have several ranks, and is one trainer
    device = job.device()

    # What is trained, and on what: each rank of each group reads a shard of its own.
    torch.manual_seed(SEED)
    model = ByteTransformer().to(device)
    adamw = ADAMW.build(model)
    corpus = ByteCorpus.load(arguments.corpus)
    context = model.shape.context
    order = Order(windows=corpus.windows(context), shards=job.shards, rows=ROWS, seed=SEED)

    # From here on the other groups know of this one. Weights and optimizer heal by themselves; give
    # the manager functions for more state if you have it.
    with joining():
        manager = Manager(
            pg=ProcessGroupGloo(timeout=TIMEOUT),
            load_state_dict=None,
            state_dict=None,
            min_replica_size=MIN_GROUPS,
            timeout=TIMEOUT,
            connect_timeout=TIMEOUT,
            replica_id=f"group_{job.group}",
        )
    try:
        barrier = FinishBarrier(
            steps=arguments.steps, groups=job.groups, patience_s=arguments.finish_together_s
        )
        manager.register_state_dict_fn("together", barrier.load_state_dict, barrier.state_dict)
        replicated = Replicated(manager, model, adamw, SimpleReduceStrategy(ADAMW))
        while not barrier.reached:
            replicated.zero_grad()  # begin: who is there? who heals, and from whom?
            batch = order.batch(manager.current_step(), shard=job.shard)
            inputs, targets = (part.to(device) for part in corpus.batch(batch, context=context))
            loss = next_byte_loss(model, inputs, targets)
            loss.backward()
            average_inside(model.parameters())
            committed = replicated.step()  # average and vote: the step is taken, or discarded
            step, there = manager.current_step(), manager.num_participants()
            if not committed:
                say(f"step {step + 1} is discarded and tried again")
                continue
            for news in barrier.committed(step, there):
                say(news)
            if step % SAY_EVERY == 0:
                say(f"step {step}, {there} of {job.groups} groups, loss {loss.item():.4f}")
        replicated.finish()  # whoever missed the last step heals from the others
        state = [model.state_dict(), adamw.state_dict()]
        say(f"step {manager.current_step()}, digest of weights and optimizer: {digest(state)}")
    finally:
        manager.shutdown()


def command_line() -> argparse.Namespace:
    parser = shared_flags(__doc__, finish_together_s=FINISH_TOGETHER_S)
    parser.add_argument(
        "--steps", type=at_least(1), default=STEPS, metavar="N", help=f"to be committed ({STEPS})"
    )
    return parser.parse_args()


def say(text: str) -> None:
    print(f"DDP: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, "train_ddp.py"))
