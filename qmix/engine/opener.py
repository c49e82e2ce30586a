"""A store opened: its model over a pool of experts, and the thread that computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from qmix.engine.compute import ComputeThread
from qmix.engine.generation_config import decoding, model_generation_config, with_end_of
from qmix.engine.sampling import Sampling
from qmix.machine.kept import limit_kept_memory
from qmix.machine.measured import dense_from, widened_from
from qmix.model.as_transformers import MixtralForCausalLM
from qmix.model.build import build_model
from qmix.model.gpu.assemble import make_steps
from qmix.model.gpu.devices import pin
from qmix.model.gpu.spread import Spread
from qmix.model.gpu.steps import Steps
from qmix.model.kv import KVCache
from qmix.plan import Plan
from qmix.plan.here import check_structured
from qmix.pool.experts import ExpertPool
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store
from qmix.store.use import StoreUse
from qmix.text.constraint import Constraint, GrammarCompiler
from qmix.text.tokenizer import decode, load_tokenizer

Self = TypeVar("Self", bound="OpenModel")


class OpenModel:
    """A model that is ready to compute: `model` over `pool`, used by `thread`. Base of all that runs a store.

    Close it, or use it as a context manager. Where nothing can be opened, no memory and no file stays in use.
    """

    model: MixtralForCausalLM
    tokenizer: PreTrainedTokenizerBase  # where text is generated

    def __init__(
        self,
        store: Store,
        slots: Mapping[int, int],
        attention: str,
        *,
        spread: Spread | None = None,
        invariant: bool = False,
        generates: bool = True,
        on_load: OnProgress = ignore,
    ) -> None:
        """`slots` are those of the pool, by the bytes of their records; `attention` as `build_model` takes it.

        With `spread` the model lies on several devices. With `invariant` a token's numbers depend on its own sequence
        alone. `generates` wants a tokenizer and the model's generation config. `on_load` is told of experts that are
        read beforehand, which happens where all of them fit. Raises StoreError where the store is damaged.
        """
        limit_kept_memory()
        self.store = store
        self._grammars: GrammarCompiler | None = None
        with ExitStack() as opened:
            opened.callback(StoreUse(store.directory).close)
            if generates:
                self.tokenizer = load_tokenizer(store.directory)
            elsewhere = spread.residents if spread else frozenset()
            widened = {} if invariant else widened_from(store.layout.dtype)
            if spread:
                opened.callback(spread.let_go)
                spread.dense_from = dense_from(store.layout.dtype)
            self.pool = ExpertPool(store, slots, invariant=invariant, elsewhere=elsewhere, widened_from=widened)
            opened.callback(self.pool.close)
            self.thread = ComputeThread(self.pool)
            gpus = [each for each in spread.devices.values() if each.device.type == "cuda"] if spread else []
            if spread and gpus:
                unpin = pin(self.pool.memory, gpus)
                if unpin is None:
                    spread.copy_unpinned()
                else:
                    opened.callback(unpin)
            opened.callback(self.thread.close)
            self.model = build_model(store, self.pool, attention, spread)
            if generates:
                config = model_generation_config(store.directory, store.config)
                self.model.generation_config = with_end_of(self.tokenizer, config, store.geometry.vocab_size)
            if self.pool.holds_all:
                self.pool.fill(on_load)
            self._opened = opened.pop_all()

    def capture(self, spread: Spread, cache: KVCache, tokens: int) -> Steps | None:
        """Capture steps of up to `tokens` tokens over `cache`; None where there are no kernels for them."""
        if spread.kernels is None:
            return None
        try:
            self.model.steps = steps = make_steps(self.model, spread, cache, spread.kernels, tokens)
        except BaseException:
            self.close()
            raise
        return steps

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what runs, at the next expert or token, and let go of files and memory; harmless to repeat."""
        self._opened.close()

    def constraint(self, sampling: Sampling, plan: Plan) -> Constraint | None:
        """Return the constraint of one answer, None where it may be any text. Raises UsageError."""
        if (source := sampling.source) is None:
            return None
        if self._grammars is None:
            check_structured(self.store.geometry, plan)
            ends = decoding(self.model.generation_config, sampling).ends
            self._grammars = GrammarCompiler(self.tokenizer, self.store.geometry.vocab_size, ends)
        return self._grammars.constraint(source)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and otherwise as it is."""
        return decode(self.tokenizer, ids)
