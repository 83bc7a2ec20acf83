"""Train a GPT on N simulated nodes, by any strategy, on whatever text is at hand.

    python3 examples/gpt.py --generate 200                     bytes of Python's standard library
    python3 examples/gpt.py --text *.md --level character
    python3 examples/gpt.py --text book.txt --tokenizer gpt2/  GPT-2's byte pairs from local files
    python3 examples/gpt.py --memmap train.bin val.bin --model_size base --block_size 1024

Flags have the names that nanoGPT-like scripts use; `--num-nodes` means `--num_nodes`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from text import (
    GPT2_VOCABULARY,
    BytePairs,
    Bytes,
    Characters,
    TextError,
    Tokenizer,
    Windows,
    memmapped,
    read,
    standard_library,
    tokenised,
)
from transformer import GPT, SIZES, GPTConfig

from torchft.arguments import at_least
from torchft.errors import SettingsError
from torchft.experiments import Trainer
from torchft.simulator import Result
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    Strategy,
)

Flags = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> None:
    flags = command_line(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    train, held_out, tokenizer, vocabulary = load(flags)
    torch.manual_seed(flags.seed)
    config = GPTConfig.of_size(
        flags.model_size,
        block_size=flags.block_size,
        vocab_size=vocabulary,
        dropout=flags.dropout,
    )
    model = GPT(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{len(train.tokens):,} tokens of a vocabulary of {vocabulary:,}; {parameters:,} "
        f"parameters on {flags.num_nodes} nodes, strategy {flags.strategy}",
        flush=True,
    )
    trained, result = fit(flags, model, train, held_out)
    report(result)
    if flags.generate:
        print(sample(trained, tokenizer, flags))


def fit(flags: Flags, model: GPT, train: Windows, held_out: Windows) -> tuple[GPT, Result]:
    """The mean of all nodes' models, and how it came about."""
    trainer = Trainer(model, train, held_out, device=flags.device or None)
    trained = trainer.fit(
        num_epochs=flags.epochs,
        max_steps=flags.max_steps,
        strategy=STRATEGIES[flags.strategy](flags),
        num_nodes=flags.num_nodes,
        batch_size=flags.batch_size,
        minibatch_size=flags.minibatch_size or flags.batch_size,
        val_size=min(flags.val_size, len(held_out)),
        val_interval=flags.val_interval,
        correlation_interval=flags.correlation_interval,
        checkpoint_interval=flags.checkpoint_interval,
        save_dir=flags.save_dir,
        wandb_project=flags.wandb_project,
        run_name=flags.run_name,
        log_x_axis=flags.log_x_axis,
        seed=flags.seed,
        autocast=flags.autocast,
        logger=None if flags.wandb_project or flags.run_name else "none",
    )
    return trained, trainer.result


def report(result: Result) -> None:
    """How it learned, and what it took."""
    last = result.validations[-1]
    print(
        f"step {last['step']}: loss of the mean model {last['global_loss']:.4f}, of the nodes' own "
        f"{last['local_loss']:.4f}; {result.seconds['train']:.1f} s; each node sent "
        f"{max(result.bytes_sent) / 1e6:.1f} MB"
    )


def sample(model: GPT, tokenizer: Tokenizer | None, flags: Flags) -> str:
    """What the model goes on with after the prompt."""
    if tokenizer is None:
        raise SettingsError("a sample of a memmap needs --tokenizer, to be read as text")
    model.eval()
    device = next(model.parameters()).device
    prompt = torch.tensor([list(tokenizer.encode(flags.prompt))], dtype=torch.long, device=device)
    torch.manual_seed(flags.seed)
    drawn = model.generate(prompt, flags.generate, temperature=flags.temperature, top_k=flags.top_k)
    return tokenizer.decode(drawn[0].tolist())


# ---------------------------------------------------------------------- data


def load(flags: Flags) -> tuple[Windows, Windows, Tokenizer | None, int]:
    """For training, held out, how to read tokens, and how many there can be."""
    tokenizer = BytePairs.load(flags.tokenizer) if flags.tokenizer else None
    if flags.memmap:
        if any(getattr(flags, share) is not None for share in SHARES):
            raise SettingsError(f"{', '.join(SHARES)} cut one text: --memmap has two files")
        vocabulary = flags.vocab_size or GPT2_VOCABULARY
        train, held_out = (memmapped(path, vocabulary) for path in flags.memmap)
    else:
        if flags.vocab_size:
            raise SettingsError("--vocab_size is for --memmap: a text brings its own")
        text = read(flags.text) if flags.text else standard_library()
        if not flags.text:
            print("No --text: the sources of Python's standard library", flush=True)
        tokenizer = tokenizer or (Characters.of(text) if flags.level == "character" else Bytes())
        vocabulary = tokenizer.vocab_size
        tokens = tokenised(text, tokenizer)
        train, held_out = cut(tokens, flags)
    return (
        Windows(train, flags.block_size),
        Windows(held_out, flags.block_size),
        tokenizer,
        vocabulary,
    )


SHARES = {"start_pc": 0.0, "end_pc": 0.9, "val_start_pc": 0.9, "val_end_pc": 1.0}
"""Where training and validation begin and end, as shares of the text."""


def cut(tokens: Any, flags: Flags) -> tuple[Any, Any]:
    """The two parts of one text."""
    given = {name: getattr(flags, name) for name in SHARES}
    shares = [default if given[name] is None else given[name] for name, default in SHARES.items()]
    if not (0 <= shares[0] < shares[1] <= 1 and 0 <= shares[2] < shares[3] <= 1):
        raise SettingsError(f"{', '.join(SHARES)} must be shares that rise from 0 to 1: {shares}")
    at = [int(share * len(tokens)) for share in shares]
    return tokens[at[0] : at[1]], tokens[at[2] : at[3]]


# ---------------------------------------------------------------------- strategies


def inner(flags: Flags, cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    """What they all take."""
    return {
        "optim_spec": OptimSpec(cls, lr=flags.lr),
        "max_norm": flags.max_norm,
        "lr_scheduler": "lambda_cosine",
        "lr_scheduler_kwargs": {
            "warmup_steps": flags.warmup_steps,
            "cosine_anneal": flags.cosine_anneal,
        },
    }


def outer(flags: Flags) -> OptimSpec:
    """DiLoCo's outer optimizer."""
    return OptimSpec(
        torch.optim.SGD,
        lr=flags.outer_lr,
        nesterov=flags.nesterov,
        momentum=flags.outer_momentum,
    )


def all_reduce(flags: Flags) -> Strategy:
    return SimpleReduceStrategy(**inner(flags))


def fedavg(flags: Flags) -> Strategy:
    return FedAvgStrategy(H=flags.H, island_size=flags.island_size, **inner(flags))


def sparta(flags: Flags) -> Strategy:
    return SPARTAStrategy(
        p_sparta=flags.p_sparta, sparta_interval=flags.sparta_interval, **inner(flags)
    )


def diloco(flags: Flags) -> Strategy:
    return DiLoCoStrategy(H=flags.H, outer_optim_spec=outer(flags), **inner(flags))


def sparta_diloco(flags: Flags) -> Strategy:
    return SPARTADiLoCoStrategy(
        H=flags.H,
        outer_optim_spec=outer(flags),
        p_sparta=flags.p_sparta,
        sparta_interval=flags.sparta_interval,
        **inner(flags),
    )


def demo(flags: Flags) -> Strategy:
    return DeMoStrategy(
        compression_decay=flags.compression_decay,
        compression_topk=flags.compression_topk,
        compression_chunk=flags.compression_chunk,
        weight_decay=flags.weight_decay,
        **inner(flags, torch.optim.SGD),
    )


STRATEGIES: dict[str, Callable[[Flags], Strategy]] = {
    "base": all_reduce,
    "ddp": all_reduce,
    "fedavg": fedavg,
    "sparta": sparta,
    "diloco": diloco,
    "diloco_sparta": sparta_diloco,
    "demo": demo,
}


# ---------------------------------------------------------------------- the command


def command_line(argv: Sequence[str] | None = None) -> Flags:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data_flags(parser)
    training_flags(parser)
    strategy_flags(parser)
    flags = parser.parse_args(argv)
    if flags.memmap and flags.text:
        parser.error("give --text or --memmap, not both")
    if flags.generate and flags.memmap and not flags.tokenizer:
        parser.error("--generate with --memmap needs --tokenizer, so that tokens can be read")
    return flags


def data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    flag = group.add_argument
    flag("--text", type=Path, nargs="+", metavar="FILE", help="(the standard library's sources)")
    flag("--level", choices=("byte", "character"), default="byte", help="of a token (byte)")
    flag("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, or vocab and merges")
    flag("--memmap", type=Path, nargs=2, metavar=("TRAIN", "VAL"), help="files of uint16 tokens")
    number(group, "vocab_size", at_least(1), None, f"of --memmap ({GPT2_VOCABULARY})")
    for name, default in SHARES.items():
        number(group, name, float, None, f"share of the text ({default:g})")
    number(group, "block_size", at_least(1), 64, "tokens seen at once")
    number(group, "generate", at_least(0), 0, "tokens to draw from the trained model")
    flag("--prompt", default="def ", help="what they follow (def)")
    number(group, "temperature", float, 0.8, "of the drawing")
    number(group, "top_k", at_least(1), None, "most likely tokens to draw from (all)")


def training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and training")
    flag = group.add_argument
    named(group, "model_size", choices=SIZES, default="small", help="(small)")
    number(group, "dropout", float, 0.0, "share")
    number(group, "num_nodes", at_least(1), 4, "simulated")
    flag("--device", default="", help="cpu, cuda, cuda:1, mps (the best there is)")
    number(group, "epochs", at_least(1), 1, "passes through the data")
    number(group, "max_steps", at_least(1), 200, "of each node, at most")
    number(group, "batch_size", at_least(1), 8, "windows of each node in a step")
    number(group, "minibatch_size", at_least(1), None, "windows at a time (the batch)")
    number(group, "lr", float, 1e-3, "before the schedule")
    number(group, "max_norm", float, 1.0, "of each node's gradient")
    number(group, "warmup_steps", at_least(0), 20, "to the full rate")
    named(group, "cosine_anneal", action="store_true", help="then fall to a tenth of it")
    flag("--autocast", action="store_true", help="compute in bfloat16")
    number(group, "seed", int, 1337, "of everything that is drawn")
    number(group, "val_size", at_least(1), 64, "windows of a validation")
    number(group, "val_interval", at_least(1), 100, "steps between two")
    number(group, "correlation_interval", at_least(1), None, "steps (never)")
    number(group, "checkpoint_interval", at_least(1), None, "steps (never)")
    named(group, "save_dir", default="runs/gpt", metavar="FOLDER", help="(runs/gpt)")
    named(group, "wandb_project", help="log there, under --run_name")
    named(group, "run_name", help="log to logs/RUN_NAME as CSV")
    named(group, "log_x_axis", choices=("step", "examples"), default="step", help="(step)")


def strategy_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("strategy")
    group.add_argument("--strategy", choices=STRATEGIES, default="diloco", help="(diloco)")
    number(group, "H", at_least(1), 20, "steps between two rounds")
    number(group, "island_size", at_least(1), None, "of fedavg (all nodes)")
    number(group, "p_sparta", float, 0.005, "share of the weights")
    number(group, "sparta_interval", at_least(1), 1, "steps")
    number(group, "outer_lr", float, 0.7, "of diloco")
    named(group, "nesterov", action=argparse.BooleanOptionalAction, default=True, help="(yes)")
    number(group, "outer_momentum", float, 0.9, "of diloco")
    number(group, "compression_decay", float, 0.999, "of demo's momentum")
    number(group, "compression_topk", at_least(1), 32, "numbers kept of a block")
    number(group, "compression_chunk", at_least(1), 64, "side of a block")
    number(group, "weight_decay", float, 0.0, "of demo")


def number(group: Any, name: str, kind: Any, default: Any, meaning: str) -> None:
    shown = meaning if default is None else f"{meaning} ({default:g})"
    named(group, name, type=kind, default=default, metavar="N", help=shown)


def named(group: Any, name: str, **rest: Any) -> None:
    """`--a_name` as in other scripts, and `--a-name` as in ours."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    group.add_argument(*spellings, dest=name, **rest)


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, TextError) as error:
        sys.exit(f"gpt.py: {error}")
