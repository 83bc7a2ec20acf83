"""DiLoCo: replica groups train apart for 100 steps, then take one outer step together, and so on.

Start a lighthouse, then this script in as many shells as there are groups, each with a number of
its own. Kill one whenever you like, watch the others go on, start it again: it heals.
TORCH_CPP_LOG_LEVEL=ERROR keeps torch's own warnings away.
`minimal_diloco.py` does it with torchft.local_sgd.DiLoCo, as existing torchft scripts do.

    torchft_lighthouse --min_replicas 1 --quorum_tick_ms 100 --join_timeout_ms 10000

    TORCHFT_LIGHTHOUSE=http://localhost:29510 REPLICA_GROUP_ID=0 NUM_REPLICA_GROUPS=2 \
        torchrun --master_port=29600 --nnodes=1 --nproc_per_node=1 examples/diloco/train_diloco.py

or all at once: `cd examples/diloco && torchx run`.
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
from torchft.strategies import DiLoCoStrategy, OptimSpec
from torchft.toy.byte_model import ByteCorpus, ByteTransformer, Order, next_byte_loss

SYNC_EVERY = 100  # inner steps of each group between two outer steps
OUTER_STEPS = 100  # then it ends; some minutes on a laptop
ROWS = 8  # windows of text in a batch
INNER = OptimSpec(torch.optim.AdamW, lr=1e-3)  # local to each group
OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)  # equal in all groups
FINISH_TOGETHER_S = 60  # a group that is away at the end is waited for so long
MIN_GROUPS = 1  # fewer groups than this take no outer step
TIMEOUT = timedelta(seconds=30)  # of what groups wait for; ranks of a group wait longer
SEED = 0


def main() -> None:
    arguments = command_line()
    job = JobRank.join(TIMEOUT)  # a group may have several ranks, and is one trainer
    device = job.device()

    # What is trained, and on what: each rank of each group reads a shard of its own.
    torch.manual_seed(SEED)
    model = ByteTransformer().to(device)
    inner = INNER.build(model)
    corpus = ByteCorpus.load(arguments.corpus)
    context = model.shape.context
    order = Order(windows=corpus.windows(context), shards=job.shards, rows=ROWS, seed=SEED)

    # From here on the other groups know of this one. Weights, inner and outer optimizer heal by
    # themselves; give the manager functions for more state if you have it.
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
            steps=arguments.outer_steps, groups=job.groups, patience_s=arguments.finish_together_s
        )
        manager.register_state_dict_fn("together", barrier.load_state_dict, barrier.state_dict)
        inner_steps = 0
        strategy = DiLoCoStrategy(INNER, OUTER, H=arguments.sync_every)
        replicated = Replicated(manager, model, inner, strategy)
        while not barrier.reached:
            outer_steps = manager.current_step()
            batch = order.batch(inner_steps, shard=job.shard)
            inputs, targets = (part.to(device) for part in corpus.batch(batch, context=context))
            replicated.zero_grad()
            loss = next_byte_loss(model, inputs, targets)
            loss.backward()
            average_inside(model.parameters())
            replicated.step()  # every SYNC_EVERY-th time it also takes the outer step
            inner_steps += 1
            if inner_steps % arguments.sync_every == 0:
                say(f"Number of inner optimizer steps completed: {inner_steps}")
            if manager.current_step() != outer_steps:
                done, there = manager.current_step(), manager.num_participants()
                say(
                    f"Number of outer optimizer steps completed: [{done}] "
                    f"loss = {loss.item()}, {there} of {job.groups} groups"
                )
                for news in barrier.committed(done, there):
                    say(news)
        replicated.finish()  # whoever missed the last outer step heals from the others
        state = replicated.shared_state_dict()
        say(f"step {manager.current_step()}, digest of weights and outer state: {digest(state)}")
    finally:
        manager.shutdown()


def command_line() -> argparse.Namespace:
    parser = shared_flags(__doc__, finish_together_s=FINISH_TOGETHER_S)
    parser.add_argument(
        "--outer-steps",
        type=at_least(1),
        default=OUTER_STEPS,
        metavar="N",
        help=f"to be committed ({OUTER_STEPS})",
    )
    parser.add_argument(
        "--sync-every",
        type=at_least(1),
        default=SYNC_EVERY,
        metavar="N",
        help=f"inner steps in an outer one ({SYNC_EVERY})",
    )
    return parser.parse_args()


def say(text: str) -> None:
    print(f"DiLoCo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, "train_diloco.py"))
