"""Time llama.cpp's `llama-bench` on a GPU: all layers there, or the experts of some layers on the host (`-ncmoe`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_steps import GIB, NEW, PROMPT, ROOT, Peak, StepError, last_line, run

EXPERT_BITS = 4.5  # of a weight in Q4_0
# CUDA's context, the buffers of a batch of 512, and the blocks of its allocator.
BESIDES = 1.2 * GIB
GGUF_BYTES = 28e9  # of 8x7B in Q4_0 with dense weights in bf16
WRITING = 240  # seconds
TRIES = 4  # of numbers of layers, one more each time, until the peak is within the budget


def found_program(given: Path | None) -> str | None:
    """Return llama-bench: the one that was given, or the one on the PATH."""
    return str(given) if given is not None else shutil.which("llama-bench")


def write_gguf(peer: str, store: Path, target: Path, limit: float) -> None:
    """Write the store's model as GGUF with an environment `peer` that has gguf and llama-cpp-python."""
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    command = [peer, str(ROOT / "benchmarks/gguf_writer.py"), str(store), str(part), "--dense", "bf16"]
    status, out, err = run(command, limit)
    if status:
        raise StepError(f"no GGUF was written: {last_line(err, out)}")
    part.rename(target)


def layers_on_host(budget: int, geometry: Any, dense: int, cache: int) -> int:
    """Return for how many layers the experts must stay on the host to hold the others in `budget` bytes.

    `dense` and `cache` are bytes that lie on the GPU in any case.
    """
    weights = 3 * geometry.hidden_size * geometry.intermediate_size * geometry.num_experts
    room = budget - dense - cache - BESIDES
    fitting = int(max(0.0, room) // (weights * EXPERT_BITS / 8))
    return max(0, geometry.num_layers - fitting)


def figures(text: str) -> dict[str, float]:
    """Return tokens/s of llama-bench's JSON: of the prompt as "prefill", of new tokens as "decode"."""
    start = text.find("[")
    if start < 0:
        raise StepError(f"llama-bench printed no JSON: {last_line(text)}")
    found = {}
    for each in json.JSONDecoder().raw_decode(text[start:])[0]:
        if each["n_prompt"] and not each["n_gen"]:
            found["prefill"] = float(each["avg_ts"])
        elif each["n_gen"] and not each["n_prompt"]:
            found["decode"] = float(each["avg_ts"])
    return found


def timed(
    program: str, gguf: Path, prompt: int, new: int, host_layers: int, budget: int | None, limit: float
) -> dict[str, Any]:
    """Return llama.cpp's figures, its peaks of GPU memory, and for how many layers the experts were on the host.

    One more layer's experts are left there while the peak of a first GPU is above `budget` bytes.
    """

    def once(layers: int) -> dict[str, Any]:
        command = [program, "-m", str(gguf), "-p", str(prompt), "-n", str(new), "-r", "2", "-ngl", "99", "-o", "json"]
        command += ["-ncmoe", str(layers)] if layers else []
        with Peak() as peak:
            status, out, err = run(command, limit)
        if status:
            raise StepError(f"llama-bench: {last_line(err, out)}")
        return {**figures(out), "peak": peak.nbytes, "host_layers": layers}

    return within(once, host_layers, budget)


def within(once: Callable[[int], dict[str, Any]], layers: int, budget: int | None) -> dict[str, Any]:
    """Return the first result whose peak is within the budget, of `layers` and up to three more on the host."""
    for more in range(TRIES):
        found = once(layers + more)
        if budget is None or not found["peak"] or found["peak"][0] <= budget:
            return found
    raise StepError(
        f"llama.cpp took more than {budget} bytes with the experts of {layers + TRIES - 1} layers on the host"
    )


def compare(machine: Any, wanted: Sequence[Any], limit: float) -> None:
    """Take a step for llama.cpp in each budget of one GPU, `limit` seconds at most, if it is there."""
    program, store = found_program(machine.given.llama_bench), machine.directory / "8x7b"
    gguf = machine.given.gguf or machine.directory / "8x7b.gguf"
    if program is None or not store.is_dir():
        return
    if not gguf.is_file() and machine.given.peer:

        def write(seconds: float) -> bool:
            machine.require(GGUF_BYTES)
            write_gguf(str(machine.given.peer), store, gguf, seconds)
            return True

        machine.steps.take("GGUF of 8x7b", WRITING, write)
    if not gguf.is_file():
        machine.steps.say(f"no llama.cpp: {gguf} is not there, and no --peer to write it")
        return
    for case in (case for case in wanted if len(case.budgets) == 1):
        plan = machine.steps.results.get(f"plan of {case.name}")
        if plan is not None:
            work = partial(timed_beside, program, gguf, case.budgets[0], plan)
            machine.steps.take(f"llama.cpp of {case.name}", limit, work)


def timed_beside(program: str, gguf: Path, budget: int, plan: dict[str, Any], limit: float) -> Any:
    from synthetic_weights import PRESETS

    device = plan["devices"][0]
    layers = layers_on_host(budget, PRESETS["8x7b"], device["dense"], device["kv_cache"])
    return timed(program, gguf, PROMPT, NEW, layers, budget, limit)
