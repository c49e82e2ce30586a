"""`qmix plan`: what would lie where."""

from __future__ import annotations

import json
from typing import Any

import click

from qmix.commands.shared import (
    attention_option,
    context_option,
    dtype_option,
    model_or_default,
    out,
    precision_option,
    ram_option,
)
from qmix.errors import DoesNotFitError


@click.command()
@click.argument("model", required=False)
@ram_option
@context_option
@precision_option
@dtype_option
@attention_option
@click.option("--json", "as_json", is_flag=True, help="the plan as JSON")
def plan(model: str | None, as_json: bool, **options: Any) -> None:
    """Say what of MODEL lies where under a budget, reading no weights. Exit code 3: it does not fit."""
    from qmix.prepare import layout_of, plan_for

    name = model_or_default(model)
    try:
        layout = layout_of(name, options["precision"], options["dtype"])
        made = plan_for(layout, options["ram"], options["context"], options["attn"])
    except DoesNotFitError as error:
        if as_json:
            out(json.dumps({"schema": "qmix-plan-1", "fits": False, "smallest": error.smallest}) + "\n")
        raise
    if as_json:
        out(json.dumps({"fits": True} | made.to_json()) + "\n")
    else:
        from qmix.terminal import plan_table, print_table

        print_table(plan_table(made, name))
