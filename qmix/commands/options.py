"""Options that several commands have: declarations, and types of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qmix.commands.parameters import Bias, Size, speak_as

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
MODEL_HELP = "a store, a checkpoint directory, a Hub id (org/name[@revision]), or the embedded `tiny`"
PRECISION_HELP = "precision of the experts: nf4 (default), fp4, int8, half; of some, as in nf4,0.*=int8,*.3=half"
CLIP_HELP = "choose the scales of 4-bit blocks by least squared error; see docs/fidelity.md"


def _speak_as_all(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        speak_as(value)
    return values


def _biases(context: click.Context, parameter: click.Parameter, values: tuple[tuple[int, float], ...]) -> Any:
    return dict(values) or None


precision_option = click.option("--precision", metavar="SPEC", help=PRECISION_HELP)
profile_option = click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="expert use and quantisation errors, written by `qmix calibrate`",
)
budget_option = click.option(
    "--budget",
    type=Size(),
    metavar="SIZE",
    help="bytes of all experts: the profile chooses the precisions with the least error that fit",
)
clip_option = click.option("--clip", is_flag=True, help=CLIP_HELP)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16"]),
    help="precision of the dense weights [the checkpoint's own]",
)
max_new_tokens_option = click.option(
    "--max-new-tokens", type=int, default=256, show_default=True, help="most tokens to generate"
)
ram_option = click.option(
    "--ram", type=Size(), metavar="SIZE", help="memory of the whole process, such as 12GiB [90% of free memory]"
)
GPU_HELP = "memory of a GPU, such as 24GiB, or a card such as 4090; repeat for each, or `none` [those found]"
batch_gpu_option = click.option(
    "--gpu",
    multiple=True,
    metavar="SIZE",
    callback=_speak_as_all,
    help="run on a GPU, such as 24GiB or 4090; repeat for each [the CPU alone]",
)
gpu_option = click.option("--gpu", multiple=True, metavar="SIZE", callback=_speak_as_all, help=GPU_HELP)
context_option = click.option(
    "--context", type=click.IntRange(min=1), metavar="TOKENS", help="tokens of prompt and answer together [4096]"
)
plan_option = click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="a plan written by `qmix plan --json`, in place of --ram, --gpu and --context",
)
attention_option = click.option(
    "--attn",
    type=click.Choice(["eager", "sdpa", "flash_attention_2"]),
    default="sdpa",
    show_default=True,
    help="attention implementation",
)


live_option = click.option(
    "--live", is_flag=True, help="watch experts, reads, speed and memory on the terminal while it runs"
)


def together(*options: Decorator) -> Decorator:
    """Return one decorator for several options, in the order of the help text."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


loading_options = together(
    ram_option, gpu_option, context_option, precision_option, clip_option, dtype_option, attention_option, plan_option
)
sampling_options = together(
    click.option("--temperature", type=float, help="0 is greedy [the model's own]"),
    click.option("--top-p", type=float, help="[the model's own]"),
    click.option("--top-k", type=int, help="0 turns it off [the model's own]"),
    click.option("--min-p", type=float, help="[the model's own]"),
    click.option(
        "--repetition-penalty", type=float, help="for tokens of prompt and answer; 1 is off [the model's own]"
    ),
    click.option("--presence-penalty", type=float, help="subtracted from logits of tokens in the answer [0: off]"),
    click.option("--frequency-penalty", type=float, help="the same, for each time a token occurs [0: off]"),
    click.option(
        "--logit-bias",
        type=Bias(),
        multiple=True,
        callback=_biases,
        metavar="TOKEN=BIAS",
        help="added to the logit of a token id, -100 to 100; repeatable",
    ),
    click.option("--seed", type=int, help="seed of the sampling [random]"),
    click.option("--stop", multiple=True, metavar="TEXT", help="stop before this text; repeatable"),
    click.option("--ignore-eos", is_flag=True, help="continue after the end-of-text token"),
)
draft_option = click.option("--draft-ngram", type=int, metavar="N", help="draft N tokens from repeated text [0: off]")


json_schema_option = click.option(
    "--json-schema",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="answer with JSON that is valid under this JSON schema (pip install 'qmix-moe[structured]')",
)


system_options = together(
    click.option("-s", "--system", metavar="TEXT", help="system prompt"),
    click.option("--system-file", type=click.Path(path_type=Path), metavar="FILE", help="system prompt from a file"),
)
