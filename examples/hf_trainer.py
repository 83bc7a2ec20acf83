"""A `transformers.Trainer` in each replica group: any of them may die or join at any step.

    torchft_lighthouse --min_replicas 1 &
    export TORCHFT_LIGHTHOUSE=http://localhost:29510
    torchrun --nproc_per_node=1 --master_port=29600 examples/hf_trainer.py    # in two shells, with
    torchrun --nproc_per_node=1 --master_port=29601 examples/hf_trainer.py    # a port for each

Kill one with Ctrl-C: the other goes on. Start it again: it heals. It needs
`pip install 'torchft[transformers]'`.
"""

import os
import random

import torch
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.toy.corpus import ByteCorpus

STEPS = int(os.environ.get("STEPS", "500"))
CONTEXT = 64


class Windows(IterableDataset):
    """Endless windows of the files of Python's library, others in each group."""

    def __iter__(self):
        corpus, choice = ByteCorpus.load(), random.Random()  # the Trainer seeds all others equally
        while True:
            start = choice.randrange(corpus.windows(CONTEXT))
            window = corpus.train[start : start + CONTEXT].long()
            yield {"input_ids": window, "labels": window}


class CountCommittedSteps(TrainerCallback):
    """The Trainer counts all steps; groups agree on those that were committed."""

    def __init__(self, manager):
        self.manager = manager

    def on_step_end(self, args, state, control, **_):
        state.global_step = self.manager.current_step()
        control.should_training_stop = state.global_step >= STEPS


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = LinearLR(adamw, 1.0, 0.1, total_iters=STEPS)

    manager = Manager(ProcessGroupGloo(), None, None, min_replica_size=1)
    # What a group that joins or comes back gets from one that trains:
    manager.register(model=model, optimizer=adamw, scheduler=schedule)
    trainer = Trainer(
        DistributedDataParallel(manager, model),  # averages gradients over the groups
        TrainingArguments(
            max_steps=STEPS,
            per_device_train_batch_size=8,
            remove_unused_columns=False,  # their names are not those of the wrapper's arguments
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Windows(),
        optimizers=(Optimizer(manager, adamw), schedule),  # all groups take a step, or none
        callbacks=[CountCommittedSteps(manager)],
    )
    trainer.train()
    manager.final_sync()  # a group that missed the last step heals from one that has it
    print(f"step {manager.current_step()}, digest {manager.registered.digest_shared()}")
    manager.shutdown()


if __name__ == "__main__":
    main()
