"""A tiny causal transformer learns to write, alone or as one of many workers of a server.

    OMP_NUM_THREADS=1 python train.py --max-steps 200                 alone, a minute of one core

    diloco server -o out/server -n 2                                  the server, and two workers:
    python train.py --diloco-server localhost:8512 --num-shards 2 --shard-index 0
    python train.py --diloco-server localhost:8512 --num-shards 2 --shard-index 1

Or `diloco worker --server HOST:8512 -- python train.py …` on each machine. Texts, sizes and
schedule are in the YAML files beside this one: `-t streaming.yaml`, `-t baseline.yaml`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from asked import Asked, Model, command_line, read
from callbacks import Diary, EndTogether, StopsOnSignal
from stories import windows_of
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from torchft.digest import digest
from torchft.errors import TorchftError
from torchft.integrations import DiLoCoCallback

RESULT, LOG = "result.json", "log.jsonl"


def main() -> int:
    typed = command_line().parse_intermixed_args()
    try:
        asked = read(typed)
        result = train(asked, resume=typed.resume, end_file=typed.end_file)
    except TorchftError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def train(asked: Asked, *, resume: bool, end_file: Path | None) -> dict[str, Any]:
    texts, held_out = windows_of(asked.data, asked.model.context)
    model = new_model(asked.model)
    trainer = Trainer(model, arguments_of(asked), train_dataset=texts, eval_dataset=held_out)
    diloco = DiLoCoCallback(**asked.diloco.model_dump()) if asked.diloco else None
    trainer.callback_handler.callbacks.insert(0, Diary(asked.output_dir / LOG))
    trainer.add_callback(StopsOnSignal())
    if diloco is not None:
        diloco.add_to(trainer)
        if end_file is not None:
            trainer.add_callback(EndTogether(end_file, diloco))

    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume or None)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    worker = diloco.worker if diloco is not None else None
    result = {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "held_out_before": before,
        "held_out_after": after,
        "digest": digest(trained),
        "version": worker.version if worker is not None else None,
        "syncs": worker.sync_count if worker is not None else 0,
        "waited_s": worker.sync_time_s if worker is not None else 0.0,
    }
    if trainer.is_world_process_zero():
        (asked.output_dir / RESULT).write_text(json.dumps(result, indent=1))
    return result


def new_model(shape: Model) -> LlamaForCausalLM:
    """Bytes are the vocabulary, so that no tokenizer is needed."""
    set_seed(shape.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=shape.width,
            intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def arguments_of(asked: Asked) -> TrainingArguments:
    how = asked.train
    return TrainingArguments(
        output_dir=str(asked.output_dir),
        max_steps=how.max_steps,
        per_device_train_batch_size=how.batch,
        per_device_eval_batch_size=how.batch,
        gradient_accumulation_steps=how.accumulate,
        learning_rate=how.lr,
        # A worker may join and leave at any time, so no schedule may count on an end.
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=how.warmup_steps,
        logging_steps=how.log_every,
        save_strategy="steps" if how.save_every else "no",
        save_steps=how.save_every or 500,
        save_total_limit=2,
        seed=how.seed,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),  # said, or ranks on CPUs are not joined
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    sys.exit(main())
