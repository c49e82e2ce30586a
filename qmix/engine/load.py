"""`qmix.load`: a model's name to a Runner. The store is resolved, planned for this machine, and opened.

A command refuses what can be refused before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.engine.resolve import prepare_store
from qmix.errors import UsageError, arg
from qmix.models import DEFAULT_MODEL
from qmix.plan import Plan
from qmix.plan.file import PlanFile
from qmix.plan.here import Gpus, plan_for, run_machine
from qmix.progress import OnProgress, ignore
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout

if TYPE_CHECKING:
    from qmix.engine.stream import Runner

ATTENTION = ("eager", "sdpa", "flash_attention_2")


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    ram: int | str | None = None,
    gpu: Gpus = None,
    context: int | None = None,
    precision: str | None = None,
    clip: bool = False,
    dtype: str | None = None,
    attention: str = "sdpa",
    plan: PlanFile | None = None,
    structured: bool = False,
    on_progress: OnProgress = ignore,
    on_load: OnProgress = ignore,
    on_store: Callable[[], object] = lambda: None,
    import_libraries: Callable[[], object] | None = None,
) -> Runner:
    """Open a model under a memory budget and return a Runner.

    `model` is a store, a checkpoint directory, a Hub id, or an embedded model's name. A checkpoint is quantised once
    into the user's cache directory; `clip` chooses the 4-bit scales of least squared error. `ram` (bytes, or text like
    "12GiB") is a ceiling for the whole process, by default 90% of the free memory. `gpu` has a ceiling for each GPU,
    "gpu:0" first: bytes, text like "24GiB", or a card's name like "RTX 4090"; by default it is all that is free on the
    GPUs that torch finds, and an empty list leaves them out. `context` is the number of tokens of prompt and answer
    together, by default 4096 or the model's own maximum. `plan` (of `qmix.plan.file.read_plan`) takes the place of all
    three. `structured` leaves room for answers with a JSON schema or a grammar. `on_progress` follows a quantisation.
    `on_store` is called when the store is there and nothing can be refused any more. `on_load` follows the experts that
    are read into memory beforehand, which happens where all of them fit. Raises QmixError; DoesNotFitError where the
    budget is too small.

    `import_libraries` imports transformers without what it loads in vain (`qmix.model.lean`): it is called after
    everything that can be refused. Without it transformers is imported as it is, and first, so that the plan counts it.
    """
    check_attention(attention)
    machine = run_machine(ram, gpu)
    if import_libraries is None:
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    def planned(layout: StoreLayout, fingerprint: str | None = None, use: ExpertFrequency | None = None) -> Plan:
        if plan is not None:
            return plan.plan_of(layout, fingerprint, attention)
        return plan_for(layout, None, context, attention, machine=machine, use=use, structured=structured)

    def check(layout: StoreLayout) -> None:
        planned(layout)
        if import_libraries is not None:
            import_libraries()

    spec = plan.precision if plan is not None and precision is None else precision
    store = prepare_store(model, spec, dtype, on_progress, check, clip)
    made = planned(store.layout, store.fingerprint, store.use)
    on_store()
    if import_libraries is not None:
        import_libraries()
    from qmix.engine.stream import Runner

    return Runner(store, made, attention, on_load, machine.rates, keeps=True)


def check_attention(name: str) -> None:
    """Raise UsageError where an attention implementation cannot run here."""
    if name not in ATTENTION:
        raise UsageError(f"{arg('attention')} {name!r}: choose one of {', '.join(ATTENTION)}")
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        missing = "the package flash-attn is not installed; use sdpa, or install it"
        raise UsageError(f"{arg('attention')} {name}: {missing}")
    if name == "flash_attention_2" and not _has_cuda():
        raise UsageError(f"{arg('attention')} flash_attention_2: needs a CUDA GPU, and there is none; use sdpa")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
