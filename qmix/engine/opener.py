"""From a store and a plan to something that generates: model, pool, cache and tokenizer put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import MixtralForCausalLM

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.generation_config import model_generation_config
from qmix.engine.resolve import prepare_store
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Engine, Piece, Result
from qmix.errors import UsageError
from qmix.machine.found import give_back_freed_memory
from qmix.machine.measured import measured_rates
from qmix.machine.rates import Rates
from qmix.model.build import build_model, check_attention
from qmix.model.gpu.devices import pin
from qmix.model.gpu.model import spread_for
from qmix.model.kv_cache import PlannedCache
from qmix.model.kv_file import kv_identity, read_kv, write_kv
from qmix.models import DEFAULT_MODEL
from qmix.plan import Plan
from qmix.plan.file import PlanFile
from qmix.plan.here import plan_for
from qmix.pool.experts import ExpertPool
from qmix.progress import OnProgress, ignore
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.store.opened import Store
from qmix.text.prompt import PromptEncoder
from qmix.text.tokenizer import decode, load_tokenizer


class Runner:
    """A model ready to run. `model` is transformers' MixtralForCausalLM and can be used as any; `plan` says what
    lies where, `rates` how fast the machine is. Close it, or use it as a context manager."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        attention: str = "sdpa",
        on_load: OnProgress = ignore,
        rates: Rates | None = None,
        kind: str = "cuda",
    ) -> None:
        """`kind` is torch's name for what stands behind the plan's GPUs, if it has any."""
        give_back_freed_memory()
        self.store, self.plan = store, plan
        self.tokenizer = load_tokenizer(store.directory)
        spread = spread_for(plan, rates or Rates(), kind)
        pool = ExpertPool(store, plan.slots_by_size, elsewhere=spread.residents if spread else frozenset())
        self._unpin = pin(pool.memory) if spread and kind == "cuda" else _nothing
        try:
            self.model: MixtralForCausalLM = build_model(store, pool, attention, spread)
            self.model.generation_config = model_generation_config(store.directory, store.config)
            if pool.holds_all:
                pool.fill(on_load)
            homes = [device.device for device in spread.layers] if spread else None
            cache = PlannedCache(store.geometry, plan.context, HALF[store.layout.dtype], layer_devices=homes)
        except BaseException:
            pool.close()
            self._unpin()
            raise
        self.encoder = PromptEncoder(self.tokenizer, plan.context, store.geometry.max_position)
        self._engine = Engine(self.model, pool, cache, self.decode, plan.ram)

    @property
    def pool(self) -> ExpertPool:
        return self._engine.pool

    @property
    def cache(self) -> PlannedCache:
        return self._engine.cache

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.close()
        self._unpin()

    def generate(
        self, prompt: str | list[int], sampling: Sampling | None = None, *, reuse: bool = False, **options: Any
    ) -> Iterator[Piece]:
        """Stream the continuation of a prompt (text, or token ids): pieces of text, the last with `.result`.

        Options are Sampling's fields. With `reuse`, tokens that the prompt begins with and the KV cache still holds
        from the last one are not computed again; keys and values that were computed one token at a time are rounded
        otherwise than those of a whole prompt, so where two tokens are nearly as likely the text may differ from that
        of a fresh run. Raises UsageError where the prompt is empty or does not fit the context.
        """
        if sampling is not None and options:
            raise UsageError("give either a Sampling or its fields, not both")
        sampling, ids = sampling or Sampling(**options), self._ids(prompt)
        room = self.plan.context - len(ids)
        return self._engine.generate(ids, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)), reuse)

    @property
    def held(self) -> list[int]:
        """The token ids whose keys and values the KV cache holds: what `reuse` can go on from."""
        return list(self._engine.held)

    def save_cache(self, path: Path) -> int:
        """Write what the KV cache holds to a safetensors file; returns how many tokens. Raises OSError."""
        write_kv(path, self._engine.cache, self._engine.held, kv_identity(self.store))
        return len(self._engine.held)

    def load_cache(self, path: Path) -> int:
        """Read a KV cache that `save_cache` wrote; returns how many tokens it holds.

        Raises SessionError where it is damaged, or of another store; the cache is empty then.
        """
        self._engine.held = []
        self._engine.held = read_kv(path, self._engine.cache, kv_identity(self.store))
        return len(self._engine.held)

    def complete(self, prompt: str | list[int], sampling: Sampling | None = None, **options: Any) -> Result:
        """The whole continuation at once."""
        for piece in self.generate(prompt, sampling, **options):
            if piece.result is not None:
                return piece.result
        raise AssertionError("a generation ended without a result")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str) and not prompt.strip():
            raise UsageError("the prompt is empty; give some text to continue")
        ids = self.encoder.ids(prompt) if isinstance(prompt, str) else list(prompt)
        if not all(type(token) is int for token in ids):
            raise UsageError("the prompt must be text, or a list of whole numbers")
        if not ids:
            raise UsageError("the prompt has no tokens; give some text to continue")
        worst = max(ids, key=abs)
        if not 0 <= worst < self.store.geometry.vocab_size or min(ids) < 0:
            raise UsageError(f"the prompt holds the token id {worst}, outside the model's vocabulary")
        self.encoder.check_count(len(ids))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without special tokens and otherwise as it is."""
        return decode(self.tokenizer, ids)


def _nothing() -> None:
    pass


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    ram: int | str | None = None,
    context: int | None = None,
    precision: str | None = None,
    clip: bool = False,
    dtype: str | None = None,
    attention: str = "sdpa",
    plan: PlanFile | None = None,
    on_progress: OnProgress = ignore,
    on_load: OnProgress = ignore,
) -> Runner:
    """Open a model under a memory budget and return a Runner.

    `model` is a store, a checkpoint directory, a hub id, or an embedded model's name; a checkpoint is quantised once
    into the user's cache directory, with `clip` by the 4-bit scales of least squared error. `ram` (bytes, or text like
    "12GiB") is a ceiling for the whole process, by default 90% of the memory that is free; `context` the tokens of
    prompt and answer together, by default 4096 or the model's own maximum. `plan` (of `qmix.plan.file.read_plan`) is in
    place of these two. `on_progress` is told of a quantisation, `on_load` of experts read into memory beforehand, which
    happens where all of them fit. Raises QmixError; DoesNotFitError where the budget is too small.
    """
    check_attention(attention)

    def planned(layout: StoreLayout, fingerprint: str | None = None, use: ExpertFrequency | None = None) -> Plan:
        if plan is not None:
            return plan.plan_of(layout, fingerprint, attention)
        return plan_for(layout, ram, context, attention, use=use)

    spec = plan.precision if plan is not None and precision is None else precision
    store = prepare_store(model, spec, dtype, on_progress, planned, clip)
    return Runner(store, planned(store.layout, store.fingerprint, store.use), attention, on_load, measured_rates())
