"""Choose how many sequences are continued together: what sharing brings against its memory. Loads no torch.

A pass reads every dense weight once, and every expert that any of its tokens is routed to; experts without a slot come
from the disk. More sequences share these reads, until their keys and values take so many slots from the experts that a
pass reads more than sharing saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qmix.errors import DoesNotFitError
from qmix.geometry import Geometry
from qmix.machine.found import default_budget, interpreter_memory
from qmix.machine.rates import Machine
from qmix.plan.device_memory import CUDA_CONTEXT_BYTES, FEW_TOKENS
from qmix.plan.make import make_plan
from qmix.plan.memory import MAX_BATCH, serving_bytes
from qmix.plan.plan import Plan
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout

DISK_COST = 10.0  # a byte from disk, in bytes from memory: 3 to 4 GB/s against 30 to 50 on the machine measured
CONTEXTS = 4  # whole contexts that a server's KV cache holds
TOKEN_COST = 0.2  # an expert's product for one more token, in readings of the expert from memory


def choose_plan(
    geometry: Geometry, needs: Sequence[int], plan_of: Callable[[int, int], Plan], most: int | None = None
) -> Plan:
    """Return the plan with the least cost a token, for lines that need `needs` tokens of context.

    At most `most` sequences go together. `plan_of` makes a plan from a batch and the context of each of its sequences,
    or raises DoesNotFitError. Raises DoesNotFitError where even one sequence does not fit.
    """
    plans = [plan_of(1, max(needs))]
    for batch in _candidates(most or len(needs)):
        try:
            plans.append(plan_of(batch, context_of(needs, batch)))
        except DoesNotFitError:
            break
    return min(plans, key=lambda plan: token_cost(plan, geometry))


def plan_lines(
    layout: StoreLayout,
    needs: Sequence[int],
    ram: int | None = None,
    batch: int | None = None,
    held: int = 0,
    use: ExpertFrequency | None = None,
    gpus: Machine | None = None,
) -> Plan:
    """Return the plan of a store on this machine for lines that need `needs` tokens.

    `batch` sequences go together, as many as are best if None. `held` are bytes that the caller takes besides, `use` is
    how often each expert is used. `gpus` is a machine whose GPUs take part: up to 32 sequences go together there, and
    each has room for the longest line. Raises DoesNotFitError.
    """
    budget, own = default_budget() if ram is None else ram, interpreter_memory(kernels=True) + held
    on = gpus if gpus is not None and gpus.gpus else None
    most = len(needs) if on is None else min(len(needs), FEW_TOKENS)

    def plan_of(count: int, context: int) -> Plan:
        if on is None:
            return make_plan(layout, budget, context, own, batch=count, use=use)
        cuda, rates = on.cuda or CUDA_CONTEXT_BYTES, on.speeds
        return make_plan(layout, budget, max(needs), own, batch=count, use=use, gpus=on.gpus, rates=rates, cuda=cuda)

    if batch is not None:
        together = min(batch, most)
        return plan_of(together, context_of(needs, together))
    return choose_plan(layout.geometry, needs, plan_of, most)


def plan_server(
    layout: StoreLayout,
    context: int,
    ram: int | None,
    batch: int,
    tokens: int | None,
    use: ExpertFrequency | None,
    gpus: Machine | None = None,
) -> Plan:
    """Return the plan of a server on this machine for `batch` requests at once, each of at most `context` tokens.

    They share a KV cache of `tokens` tokens; without a number, of four contexts, or of as many as fit. On the GPUs of
    `gpus` each request has a whole context, so there may be fewer than `batch`. Raises DoesNotFitError.
    """
    for contexts in (CONTEXTS, CONTEXTS // 2, 1):
        together = tokens or contexts * context
        at_once, needs = batch, math.ceil(together / batch)
        if gpus is not None:
            at_once, needs = max(1, min(batch, together // context, FEW_TOKENS)), context
        held = serving_bytes(layout.geometry, together, at_once)
        last = tokens is not None or contexts == 1
        try:
            plan = plan_lines(layout, [needs] * at_once, ram, at_once, held, use, gpus)
        except DoesNotFitError:
            if last:
                raise
        else:
            if last or gpus is None or "cpu" not in plan.layer_devices:  # layers beside a large cache fit no GPU
                return plan
    raise AssertionError


def context_of(needs: Sequence[int], batch: int) -> int:
    """Return tokens for each of `batch` sequences that share one arena, so that the longest lines fit together."""
    return math.ceil(sum(sorted(needs, reverse=True)[:batch]) / batch)


def token_cost(plan: Plan, geometry: Geometry) -> float:
    """Return the cost of a token in a pass of `plan.batch` tokens, in bytes read from memory."""
    experts, top_k = geometry.num_experts, geometry.experts_per_token
    used = 1 - (1 - top_k / experts) ** plan.batch
    reading = plan.dense + used * (plan.expert_total + DISK_COST * plan.on_disk)
    return reading / plan.batch + TOKEN_COST * top_k / experts * plan.expert_total


def _candidates(lines: int) -> list[int]:
    """Return the batches to try above one: powers of two, three times such, and the most."""
    most = min(lines, MAX_BATCH)
    steps = {2**half for half in range(1, 9)} | {3 * 2**half for half in range(0, 8)}
    return sorted({step for step in steps if 1 < step < most} | ({most} if most > 1 else set()))
