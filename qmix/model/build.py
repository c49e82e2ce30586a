"""Build transformers' Mixtral from a store: its dense weights loaded, its experts replaced by the pool's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from qmix.checkpoint.torch_dtypes import HALF
from qmix.errors import StoreError
from qmix.geometry import CONFIG_KEYS
from qmix.model.as_transformers import MixtralForCausalLM
from qmix.model.attention import GROUPED_SDPA, register
from qmix.model.decoder_layer import use_short_layers
from qmix.model.dense import read_dense
from qmix.model.experts import PooledExperts
from qmix.model.gpu.devices import download
from qmix.model.gpu.spread import Spread
from qmix.model.invariant import make_invariant, row_by_row
from qmix.model.resident import use_resident_steps
from qmix.pool.experts import ExpertPool
from qmix.pool.prefetch import EMBEDDING, Prefetcher
from qmix.pool.protocol import Pool
from qmix.precision.dense import use_half_linear
from qmix.precision.formats import uses_kernels
from qmix.store.opened import Store

MODEL_KEYS = frozenset(CONFIG_KEYS.values()) | {  # the keys of config.json that describe the model
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",  # with the next two, transformers 4's form of rope_parameters
    "rope_theta",
    "partial_rotary_factor",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def build_model(store: Store, pool: Pool, attention: str = "sdpa", spread: Spread | None = None) -> MixtralForCausalLM:
    """Return the model in half precision with its experts in the pool; ready to use, gradients off.

    Over an `invariant` pool the whole model is invariant: a token's numbers depend on its own sequence alone. With
    `spread` the model lies on several devices; then only captured steps are invariant. `attention` is the name of a
    function registered with transformers.
    Raises StoreError where a dense weight is damaged.
    """
    model = empty_model(store, attention)
    load_weights(model, store, pool, read_dense(store, spread.of_tensor if spread else None), spread)
    return model


def empty_model(store: Store, attention: str = "sdpa") -> MixtralForCausalLM:
    """Return transformers' model for the store's config, all of it on torch's `meta` device.

    Raises StoreError where config.json cannot be used.
    """
    return empty_mixtral(store.config, store.layout.dtype, attention, store.directory / "config.json")


def empty_mixtral(
    content: dict[str, Any], dtype: str, attention: str = "sdpa", where: Path = Path("config.json")
) -> MixtralForCausalLM:
    """Return the same from a config's content. Raises StoreError naming `where`."""
    config = mixtral_config(content, where)
    config.dtype = HALF[dtype]
    config._experts_implementation = "eager"  # generate() changes any other for GPUs
    register()
    config._attn_implementation = GROUPED_SDPA if attention == "sdpa" else attention
    with _transformers_refusals(where), no_init_weights(), _rotary_on_cpu(), init_empty_weights(include_buffers=True):
        return MixtralForCausalLM(config)


@contextmanager
def _rotary_on_cpu() -> Iterator[None]:
    """Let transformers' Mixtral make its rotary embedding on the CPU, whatever device it is built on.

    On `meta`, torch computes it by decompositions, which load its compiler: a second and 45 MB.
    """

    def on_cpu(config: MixtralConfig) -> MixtralRotaryEmbedding:
        with torch.device("cpu"):
            return MixtralRotaryEmbedding(config)

    modeling_mixtral.MixtralRotaryEmbedding = on_cpu
    try:
        yield
    finally:
        modeling_mixtral.MixtralRotaryEmbedding = MixtralRotaryEmbedding


def mixtral_config(content: dict[str, Any], where: Path) -> MixtralConfig:
    """Return transformers' config with MODEL_KEYS only. Raises StoreError naming `where`.

    Other keys concern training, other programs or transformers' way to run (`torchscript`, `use_cache`,
    `attn_implementation`, `quantization_config`); as attributes of the config they would change what runs.
    """
    kept = deepcopy({key: value for key, value in content.items() if key in MODEL_KEYS})  # transformers changes it
    with _transformers_refusals(where):
        config = MixtralConfig(**kept)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is not an activation of transformers")
        if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
            raise ValueError(f"pad_token_id {config.pad_token_id} is outside the vocabulary of {config.vocab_size}")
        return config


def load_weights(
    model: MixtralForCausalLM,
    store: Store,
    pool: Pool,
    dense: dict[str, torch.Tensor],
    spread: Spread | None = None,
    prefetcher: type[Prefetcher] = Prefetcher,
) -> None:
    """Put experts and dense weights into an empty model. `dense` is by published name, each on its device."""
    activation = activation_of(model.config)
    model.pool = pool
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts = PooledExperts(index, pool, activation)
    model.model.rotary_emb = rotary_embedding(model.config, store.directory / "config.json")
    for name, value in dense.items():
        set_module_tensor_to_device(model, module_name(name), value.device, value=value, dtype=value.dtype)
    if store.geometry.tie_embeddings:
        model.tie_weights()
    kernels = uses_kernels(store.geometry)
    if pool.invariant and spread is None:
        kernels = kernels and model.dtype == torch.bfloat16
        make_invariant(model, kernels)
    elif kernels:
        use_half_linear(model)
    if kernels:
        use_short_layers(model)
        if isinstance(pool, ExpertPool) and pool.holds_all and spread is None:
            use_resident_steps(model, pool)
    if spread is not None:
        spread.put_experts(model, pool, row_by_row(activation) if pool.invariant else activation)
        spread.connect(model)
    model.lm_head.register_forward_pre_hook(_natural_strides)
    if not pool.holds_all:
        _attach_prefetcher(model, pool, prefetcher)
    model.eval().requires_grad_(False)


def _attach_prefetcher(model: MixtralForCausalLM, pool: Pool, kind: type[Prefetcher]) -> None:
    """Let the embeddings and each layer tell the pool which experts later layers will probably ask for."""
    norms = torch.stack([download(layer.post_attention_layernorm.weight) for layer in model.model.layers])
    gates = torch.stack([download(layer.mlp.gate.weight) for layer in model.model.layers])
    prefetcher = kind(norms, gates, pool.store.geometry.experts_per_token, elsewhere=pool.elsewhere)
    for layer in model.model.layers:
        layer.mlp.experts.prefetcher = prefetcher

    def embedded(module: nn.Module, arguments: object, embeddings: torch.Tensor) -> None:
        pool.prefetch(EMBEDDING, prefetcher.coming(EMBEDDING, embeddings.flatten(0, -2)))

    model.model.embed_tokens.register_forward_hook(embedded)


def rotary_embedding(config: MixtralConfig, where: Path) -> MixtralRotaryEmbedding:
    """Return a config's rotary embedding. Raises StoreError where transformers refuses it."""
    with _transformers_refusals(where):
        return MixtralRotaryEmbedding(config)


def check_frequencies(config: MixtralConfig, where: Path) -> None:
    """Raise StoreError where a config's rope settings give no finite numbers. Needs real tensors."""
    rotary = rotary_embedding(config, where)
    with _transformers_refusals(where):
        cos, sin = rotary(torch.zeros(1), torch.arange(2)[None])
        if not (cos.isfinite().all() and sin.isfinite().all()):
            raise ValueError("its rope settings give frequencies that are not finite")


def activation_of(config: MixtralConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an expert's activation."""
    if config.hidden_act == "silu":  # every published Mixtral's; faster as a function than as a module
        return nn.functional.silu
    activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.hidden_act]
    return activation


def _natural_strides(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Give the last position of a chunk's hidden states, [1, 1, H], the strides of a tensor of its own.

    As a slice it has the stride of the whole chunk, and torch 2.13 then multiplies it as a batch of one after copying
    the head's weight: 30 times slower, and as much memory again as the weight.
    """
    (hidden,) = arguments
    return (hidden.reshape(-1).view(hidden.shape),)


def module_name(published: str) -> str:
    """Return the name of a weight in transformers 5, which calls the mixture of experts `mlp`."""
    return published.replace(".block_sparse_moe.", ".mlp.")


@contextmanager
def _transformers_refusals(path: Path) -> Iterator[None]:
    """Turn any exception from transformers about a file's content into a StoreError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
        raise StoreError(f"{path}: transformers refuses it ({reason[:200]}); correct it or fetch it again") from None
