"""Fault-tolerant data-parallel training in one screen: public names only.

    torchft_lighthouse --min_replicas 1 &
    export TORCHFT_LIGHTHOUSE=http://localhost:29510
    torchrun --nproc_per_node=1 --master_port=29600 examples/minimal_ddp.py    # in two shells, with
    torchrun --nproc_per_node=1 --master_port=29601 examples/minimal_ddp.py    # a port for each

Kill one with Ctrl-C: the other goes on. Start it again: it heals.
"""

import os

import torch
from torch import nn
from torch.nn.functional import mse_loss

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

STEPS = int(os.environ.get("STEPS", "1000"))


def main() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def save():  # what a group that joins or comes back gets from one that trains
        return {"model": model.state_dict(), "optimizer": adamw.state_dict()}

    def load(state):
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    manager = Manager(ProcessGroupGloo(), load, save, min_replica_size=1)
    ddp = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, adamw)
    while manager.current_step() < STEPS:
        inputs = torch.randn(32, 16)
        optimizer.zero_grad()  # begins a step: which groups are there, and who has to heal?
        loss = mse_loss(ddp(inputs), inputs.sum(1, keepdim=True))
        loss.backward()  # gradients are averaged over the groups
        committed = optimizer.step()  # all ranks of the group take the step, or none
        if committed and manager.current_step() % 100 == 0:
            there = manager.num_participants()
            print(f"step {manager.current_step()}: {there} groups, loss {loss.item():.4f}")
    manager.final_sync()  # a group that missed the last step heals from one that has it
    manager.shutdown()


if __name__ == "__main__":
    main()
