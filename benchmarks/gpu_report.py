"""Print what a measurement on GPUs found: a table of all cases, one of llama.cpp, and the goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_steps import NEW, PROMPT, TEXT, TOGETHER, Steps
from rich.console import Console
from rich.table import Table

Results = Mapping[str, Any]


def of(results: Results, step: str, case: str) -> Any:
    """Return a step's result for a case, None where there is none."""
    return results.get(f"{step} of {case}")


def rates(results: Results, case: str, kind: str) -> dict[str, float]:
    """Return tokens/s that were measured, predicted and bound, and the share of the bound, as far as they are known."""
    found: dict[str, float] = {}
    bench, plan = of(results, "bench", case), of(results, "plan", case)
    if bench is not None:
        test = f"tg{NEW}" if kind == "decode" else f"pp{PROMPT}"
        each = next(row for row in bench["rows"] if row["test"] == test)
        found |= {"rate": each["rate"], "bound": each["bound_rate"], "share": each["share_of_bound"]}
    if plan is not None:
        found["predicted"] = plan["predicted"][kind]["tokens_per_s"]
    return found


def row(results: Results, case: str) -> list[str]:
    """Return the cells of a case; a cell is empty where its step has no result."""
    cells = [case]
    for kind in ("decode", "prefill"):
        known = rates(results, case, kind)
        cells += [number(known.get(name)) for name in ("rate", "predicted", "bound")]
        cells.append(f"{known['share']:.0%}" if "share" in known else "")
    batch, bench = of(results, "batch", case), of(results, "bench", case)
    cells.append(number(batch["tok_s"] if batch else None))
    plan, text = of(results, "plan", case), of(results, "text", case)
    there = f"{plan['num_records'] - plan['host_records']} of {plan['num_records']}" if plan else ""
    peaks = " + ".join(f"{peak / 2**20:.0f} MiB" for peak in bench["peak"] if peak) if bench else ""
    return [*cells, there if plan and plan["devices"] else "", peaks, f"{text['right']} of {TEXT}" if text else ""]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(results: Results, cases: Sequence[str]) -> Table:
    """Return the table of all cases."""
    made = Table()
    made.add_column("case", no_wrap=True)
    for kind in ("decode", "prefill"):
        for what in (f"{kind}\ntok/s", "predicted", "bound", "of bound"):
            made.add_column(what, justify="right")
    for what in (f"{TOGETHER} prompts\ntok/s", "experts\non the GPU", "nvidia-smi's\npeak", "tokens\nas known"):
        made.add_column(what, justify="right")
    for case in cases:
        made.add_row(*row(results, case))
    return made


def peer_table(results: Results, cases: Sequence[str]) -> Table | None:
    """Return the table of llama.cpp in the same memory; None where it was not run."""
    heads = ("decode tok/s", "qmix's\ntimes", "prefill tok/s", "qmix's\ntimes", "layers' experts\non the host", "peak")
    made = Table("llama.cpp", *heads)
    for case in cases:
        found = of(results, "llama.cpp", case)
        if found is None:
            continue
        cells = [case]
        for kind in ("decode", "prefill"):
            mine = rates(results, case, kind).get("rate")
            cells += [number(found[kind]), f"{mine / found[kind]:.2f}" if mine else ""]
        peak = " + ".join(f"{each / 2**20:.0f} MiB" for each in found["peak"] if each)
        made.add_row(*cells, str(found["host_layers"]), peak)
    return made if made.row_count else None


def within_budgets(results: Results, budgets: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a line for each GPU whose peak was above its budget."""
    found = []
    for case, given in budgets.items():
        bench = of(results, "bench", case)
        for budget, peak in zip(given, bench["peak"] if bench else [], strict=False):
            if peak > budget:
                found.append(f"OVER BUDGET: {case}: nvidia-smi's peak is {(peak - budget) / 2**20:.0f} MiB above it")
    return found


def goals(results: Results, budgets: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a line for each figure that was to be reached and is known: the figure, and whether it is."""
    lines: list[str] = []

    def goal(
        what: str, value: float | None, least: float, shown: Callable[[float], str] = lambda x: f"{x:.2f}x"
    ) -> None:
        if value is not None:
            lines.append(f"{'reached' if value >= least else 'missed '}  {what}: {shown(value)}, wanted {shown(least)}")

    for case in budgets:
        decode, prefill = rates(results, case, "decode"), rates(results, case, "prefill")
        plan, peer, batch = (of(results, step, case) for step in ("plan", "llama.cpp", "batch"))
        resident = plan is not None and plan["devices"] and not plan["host_records"]
        if resident:
            goal(f"{case}: decode, of its bound", decode.get("share"), 0.65, "{:.0%}".format)
        elif case.startswith("8x22b"):
            goal(f"{case}: decode, of its bound", decode.get("share"), 0.85, "{:.0%}".format)
        if peer is not None and "rate" in decode:
            goal(f"{case}: decode, of llama.cpp's", decode["rate"] / peer["decode"], 1.1 if resident else 1.3)
            goal(f"{case}: prefill, of llama.cpp's", prefill["rate"] / peer["prefill"], 1.0 if resident else 1.5)
        if batch is not None and "rate" in decode and resident:
            goal(f"{case}: {TOGETHER} prompts, of one stream", batch["tok_s"] / decode["rate"], 10.0)
    return lines


def report(steps: Steps, cases: Sequence[Any]) -> None:
    """Print the tables and what failed or was left."""
    console, results = Console(width=None if Console().is_terminal else 200), steps.results
    names = [case.name for case in cases]
    console.print(table(results, names))
    if (peers := peer_table(results, names)) is not None:
        console.print(peers)
    budgets = {case.name: case.budgets for case in cases if case.budgets}
    checks = [(name, results[name]) for name in ("self-test", "tests") if name in results]
    lines = [*goals(results, budgets), *within_budgets(results, budgets)]
    for name, found in checks:
        lines += [f"{name}: {'passed' if found['passed'] else 'FAILED'}"]
        lines += [line for line in found["lines"] if line.startswith("FAILED")]
    lines += [f"failed: {name}: {why}" for name, why in steps.errors.items()]
    if steps.left:
        lines.append(f"no time left for: {'; '.join(steps.left)} (run the same command again)")
    for line in lines:
        console.print(line, markup=False, highlight=False)
