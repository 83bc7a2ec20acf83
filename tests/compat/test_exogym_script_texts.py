"""A script as it lies in a file: `exogym` is replaced, and it is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = '''
import argparse
import torch
from exogym.strategy.communicate import broadcast, all_reduce, all_gather
from exogym.strategy.strategy import SimpleReduceStrategy, Strategy
from exogym.trainer import Trainer
from exogym.strategy.optim import OptimSpec
from exogym.strategy.sparta import RandomIndexSelector
from exogym.aux.utils import get_device


class Agreeing(Strategy):
    """Only where all nodes agree on the sign is there a step."""

    def __init__(self, optim_spec=None, **kwargs):
        super().__init__(**kwargs)
        self.optim_spec = optim_spec

    def step(self):
        for parameter in self.model.parameters():
            signs = parameter.grad.sign()
            all_reduce(signs, op=torch.distributed.ReduceOp.SUM)
            parameter.grad *= signs.abs() == self.num_nodes
            all_reduce(parameter.grad)
            parameter.grad /= self.num_nodes
        self.optim.step()
        super().step()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 2)

    def forward(self, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.layer(x), y)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    x = torch.randn(64, 5)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    trainer = Trainer(Model(), data, data)
    strategy = Agreeing(
        optim_spec=OptimSpec(torch.optim.AdamW, lr=0.01),
        lr_scheduler="lambda_cosine",
        lr_scheduler_kwargs={"warmup_steps": 2, "cosine_anneal": True},
        max_norm=1.0,
        p=0.005,
    )
    trainer.fit(
        num_epochs=1,
        max_steps=6,
        strategy=strategy,
        num_nodes=args.nodes,
        device=get_device(),
        batch_size=4,
        minibatch_size=2,
        shuffle=False,
        val_size=16,
        val_interval=2,
        run_name="agreeing-run",
    )


if __name__ == "__main__":
    main()
'''


@pytest.mark.slow
def test_the_file_starts_a_second_time_too(tmp_path: Path) -> None:
    script = tmp_path / "playground.py"
    script.write_text(SCRIPT.replace("exogym", "torchft.compat.exogym"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("agreeing-run", "agreeing-run_2"):
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / "logs" / name / "validation.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["step", "0", "2", "4", "6"]
