"""`qmix bench`: speed, compared with the roofline of the machine."""

from __future__ import annotations

import json
from typing import Any

import click

from qmix.commands.options import (
    attention_option,
    clip_option,
    dtype_option,
    gpu_option,
    plan_option,
    precision_option,
    ram_option,
)
from qmix.commands.shared import (
    LOADING_PATIENCE,
    hold_to,
    load_libraries,
    model_or_default,
    out,
    read_plan_option,
    warn_of_drive,
)

PROMPTS_HELP = "prompt lengths, such as 512 or 512,1024; 0 for none [512]"
NEW_HELP = "numbers of tokens to generate, such as 128 or 128,512; 0 for none [128]"


@click.command()
@click.argument("model", required=False)
@ram_option
@gpu_option
@click.option("--context", type=click.IntRange(min=1), metavar="TOKENS", help="[as long as the longest test]")
@precision_option
@clip_option
@dtype_option
@attention_option
@plan_option
@click.option("-p", "--prompt-tokens", multiple=True, metavar="LIST", default=["512"], help=PROMPTS_HELP)
@click.option("-n", "--new-tokens", multiple=True, metavar="LIST", default=["128"], help=NEW_HELP)
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="runs of each test")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of a table")
def bench(model: str | None, attn: str, repetitions: int, as_json: bool, **options: Any) -> None:
    """Measure MODEL's speed and compare it with the roofline.

    A pp test processes a prompt, a tg test generates tokens. The bound of a test is the highest speed that the memory,
    disk, cores and GPUs of this machine allow.
    """
    options["gpu"] = options["gpu"] or None
    limits = {option: options[option] for option in ("ram", "gpu", "context")}
    given = read_plan_option(options.pop("plan_path"), **limits)
    name = model_or_default(model)
    from qmix.bench.roofline import workloads

    tests = workloads(options.pop("prompt_tokens"), options.pop("new_tokens"))
    load_libraries()
    from qmix.bench.measure import measure, prepare
    from qmix.bench.table import bench_conditions, bench_table
    from qmix.engine.stream import Runner
    from qmix.machine.ceilings import probe_in_child
    from qmix.machine.measured import measured_rates
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.tables import print_table, say

    with ProgressDisplay(f"quantizing {name}, once") as making:
        store, plan = prepare(name, tests, attention=attn, plan=given, on_progress=making, **options)
    say("measuring the memory and cores of this machine")
    machine = probe_in_child()
    hold_to(plan.ram)
    warn_of_drive(store.directory)
    with ProgressDisplay(f"loading {name}", LOADING_PATIENCE) as loading:
        runner = Runner(store, plan, attn, loading, measured_rates())
    with runner:
        report = measure(runner, tests, repetitions, machine, say)
    if as_json:
        out(json.dumps(report.to_json()) + "\n")
    else:
        print_table(bench_conditions(report), "", bench_table(report))
