"""A Lightning `Trainer` in each replica group: any of them may die or join at any step.

    torchft_lighthouse --min_replicas 1 &
    export TORCHFT_LIGHTHOUSE=http://localhost:29510
    torchrun --master_port=29600 examples/lightning_module.py    # in two shells, with
    torchrun --master_port=29601 examples/lightning_module.py    # a port for each

Kill one with Ctrl-C: the other goes on. Start it again: it heals. It needs `pip install lightning
scikit-learn`.
"""

import os

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

STEPS = int(os.environ.get("STEPS", "500"))


class Digits(L.LightningModule):
    def __init__(self, manager):
        super().__init__()
        self.manager = manager
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        # Averages gradients over the groups. A list: Lightning need not know of a second module.
        self.ddp = [DistributedDataParallel(manager, self.net)]

    def training_step(self, batch, _):
        images, labels = batch
        return cross_entropy(self.ddp[0](images), labels)

    def configure_optimizers(self):
        optimizer = Optimizer(self.manager, torch.optim.AdamW(self.net.parameters(), lr=1e-3))
        schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        # What a group that joins or comes back gets from one that trains:
        self.manager.register(model=self.net, optimizer=optimizer, scheduler=schedule)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()  # forward and backward pass, which come before the vote
        optimizer.optimizer.step()  # all groups take the step, or none

    def on_train_batch_end(self, *_):
        self.trainer.should_stop = self.manager.current_step() >= STEPS


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    manager = Manager(ProcessGroupGloo(), None, None, min_replica_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    data = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    trainer.fit(Digits(manager), data)
    manager.final_sync()  # a group that missed the last step heals from one that has it
    print(f"step {manager.current_step()}, digest {manager.registered.digest_shared()}")
    manager.shutdown()


if __name__ == "__main__":
    main()
