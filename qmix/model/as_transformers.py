"""transformers' MixtralForCausalLM over a pool of experts.

Forward, `generate`, hooks and gradients are transformers' own and torch's. Methods that go by parameters are replaced
here, because experts are not parameters: they count and save experts too, or refuse in one line with an alternative.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import transformers

from qmix.kernels.cpu.threads import one_for_torch
from qmix.model.attention import OWN_ATTENTION
from qmix.model.checkpoint_writer import write_checkpoint
from qmix.model.refusals import Convert, PoolExperts, refuse
from qmix.pool.protocol import Pool, refuse_copy


class StepForward(Protocol):
    """Serves some of a model's forwards in transformers' place; `launched` counts the graphs that this took."""

    @property
    def launched(self) -> int: ...

    def forward(self, ids: torch.Tensor | None, options: dict[str, Any]) -> Any:
        """Return the output for these arguments; None to leave them to transformers."""


class MixtralForCausalLM(transformers.MixtralForCausalLM):
    """A loaded model. It has the name of transformers' class, because losses and pipelines go by a class's name.

    `parameters()` are the dense weights: attention, norms, routers, embeddings and head. With `steps` a forward of one
    token, or of a few, is served by captured launches or by one call of the CPU's threads, and calls no layer.
    """

    pool: Pool
    steps: StepForward | None = None
    _can_compile_fullgraph = False

    @wraps(transformers.MixtralForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        if self.steps is not None and not arguments:
            found = self.steps.forward(input_ids, options)
            if found is not None:
                return found
        with self.few_threads(input_ids):
            return super().forward(input_ids, *arguments, **options)

    def few_threads(self, ids: torch.Tensor | None) -> AbstractContextManager[None]:
        """Return a context for a pass: torch has one thread in it where it has nothing but small operations.

        In a pass of few tokens qmix's kernels compute everything large, unless transformers' attention or torch's
        products are used.
        """
        ours = self.config._attn_implementation in OWN_ATTENTION and self.dtype == torch.bfloat16
        return one_for_torch(ids.numel() * self.config.hidden_size) if ours and ids is not None else nullcontext()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of weights, experts included; experts are never trainable."""
        dense: int = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return dense
        geometry = self.pool.store.geometry
        expert = sum(rows * cols for rows, cols in geometry.expert_matrices.values())
        return dense + geometry.num_records * expert

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes in memory: dense weights, the pool's slots, and experts on GPUs.

        Experts on the disk are not counted, nor is the KV cache.
        """
        dense: int = super().get_memory_footprint(return_buffers)
        on_devices = {id(part): part.nbytes for experts in self._experts for part in experts.device_tensors()}
        return dense + self.pool.memory.nbytes + sum(on_devices.values())

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> None:
        """Write the whole model as an ordinary checkpoint in half precision, with quantised experts dequantised.

        It takes little memory beside the model's own, and time to read every expert. transformers' own
        `MixtralForCausalLM.from_pretrained` opens it. Raises QmixError.
        """
        if state_dict is not None:
            refuse("save_pretrained: a state_dict cannot be written in the model's place", "leave it out")
        if push_to_hub:
            self.push_to_hub()
        for name in ("token", "save_peft_format", "save_original_format"):  # these do not affect what is written
            if options.get(name) in (None, True):
                options.pop(name, None)
        given = [name for name, value in options.items() if value not in (None, False)]
        if given:
            refuse(f"save_pretrained: {given[0]} is not supported", "leave it out")
        if is_main_process:
            write_checkpoint(self, self.pool, Path(save_directory), max_shard_size)

    def push_to_hub(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError."""
        refuse(
            "the model is not uploaded from here", "save_pretrained(DIRECTORY), then `hf upload REPOSITORY DIRECTORY`"
        )

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError."""
        refuse(
            "a model over a pool of experts is opened by qmix",
            "use qmix.load(MODEL), or from_pretrained of transformers.MixtralForCausalLM",
        )

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError."""
        refuse(
            "the vocabulary is the store's",
            "save_pretrained(DIRECTORY), resize that checkpoint with transformers, and open it with qmix.load",
        )

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError."""
        refuse(
            "transformers' continuous batching is not supported",
            "use `qmix batch`, which continues many prompts together",
        )

    continuous_batching_context_manager = generate_batch = init_continuous_batching

    def compile(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError."""
        refuse("torch.compile cannot compile the experts' kernels", "call the model itself: they are compiled")

    def to_empty(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError."""
        refuse("to_empty() would forget the dense weights", "open the store once more with qmix.load")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()

    def load_state_dict(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError, before any weight is changed."""
        self._experts[0]._load_from_state_dict()

    def _apply(self, fn: Convert, recurse: bool = True) -> MixtralForCausalLM:
        for experts in self._experts:  # checked before the first dense weight is converted
            experts.check_conversion(fn)
        applied: MixtralForCausalLM = super()._apply(fn, recurse)
        return applied

    @property
    def _experts(self) -> list[PoolExperts]:
        return [layer.mlp.experts for layer in self.model.layers]
