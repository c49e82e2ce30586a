"""transformers' Mixtral, built empty, with a store's dense weights put in and its experts replaced."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from qmix.checkpoint.torch_dtypes import HALF
from qmix.disk.files import DirectFile, anonymous_memory
from qmix.disk.reads import Read, Reader
from qmix.errors import StoreError, UsageError
from qmix.geometry import CONFIG_KEYS
from qmix.model.as_transformers import MixtralForCausalLM
from qmix.model.attention import GROUPED_SDPA, register
from qmix.model.experts import PooledExperts
from qmix.model.gpu.dense import fill_from_disk, read_dense_to
from qmix.model.gpu.devices import download
from qmix.model.gpu.model import Spread
from qmix.model.invariant import make_invariant
from qmix.pool.prefetch import EMBEDDING, Prefetcher
from qmix.pool.protocol import Pool
from qmix.precision.dense import use_half_linear
from qmix.precision.formats import uses_kernels
from qmix.store.opened import Store

MODEL_KEYS = frozenset(CONFIG_KEYS.values()) | {  # of config.json, that say what the model is
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",  # with the next two, what transformers 4 wrote in place of rope_parameters
    "rope_theta",
    "partial_rotary_factor",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
ATTENTION = ("eager", "sdpa", "flash_attention_2")


def check_attention(name: str) -> None:
    """Raises UsageError where an attention implementation cannot run here."""
    if name not in ATTENTION:
        raise UsageError(f"--attn {name!r}: choose one of {', '.join(ATTENTION)}")
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UsageError("--attn flash_attention_2: the package flash-attn is not installed; use sdpa, or install it")
    if name == "flash_attention_2" and not torch.cuda.is_available():
        raise UsageError("--attn flash_attention_2: needs a CUDA GPU, and there is none; use sdpa")


def build_model(store: Store, pool: Pool, attention: str = "sdpa", spread: Spread | None = None) -> MixtralForCausalLM:
    """The model in half precision, its experts drawn from the pool; ready to use, gradients off.

    Over a pool that is `invariant` the whole model is: a token's numbers then depend on its own sequence alone. With
    `spread` it lies on several devices. `attention` is one of ATTENTION, or the name of a function that transformers
    has been told of.

    Raises StoreError where a dense weight is damaged.
    """
    model = empty_model(store, attention)
    load_weights(
        model, store, pool, read_dense(store) if spread is None else read_dense_to(store, spread.of_tensor), spread
    )
    return model


def empty_model(store: Store, attention: str = "sdpa") -> MixtralForCausalLM:
    """transformers' model as the store's config says, all of it on torch's `meta` device.

    Raises StoreError where config.json cannot be used.
    """
    return empty_mixtral(store.config, store.layout.dtype, attention, store.directory / "config.json")


def empty_mixtral(
    content: dict[str, Any], dtype: str, attention: str = "sdpa", where: Path = Path("config.json")
) -> MixtralForCausalLM:
    """The same from a config's content; errors name `where` it stands."""
    config = mixtral_config(content, where)
    config.dtype = HALF[dtype]
    config._experts_implementation = "eager"  # of transformers' own experts: generate() changes others for a GPU's sake
    register()
    config._attn_implementation = GROUPED_SDPA if attention == "sdpa" else attention
    with _refusals(where), init_empty_weights(include_buffers=True):
        return MixtralForCausalLM(config)


def mixtral_config(content: dict[str, Any], where: Path) -> MixtralConfig:
    """Return transformers' config with what describes the model, and with nothing else that a file may hold.

    Other keys are about training, other programs or how transformers is to run (`torchscript`, `use_cache`,
    `attn_implementation`, `quantization_config`); as attributes of the config they would change what runs.
    """
    kept = deepcopy({key: value for key, value in content.items() if key in MODEL_KEYS})  # transformers changes it
    with _refusals(where):
        config = MixtralConfig(**kept)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is no activation that transformers has")
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
    """Put experts and dense weights, given by published name and lying where they are to stay, into an empty model."""
    activation = activation_of(model.config)
    model.pool = pool
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts = PooledExperts(index, pool, activation)
    model.model.rotary_emb = rotary_embedding(model.config, store.directory / "config.json")
    for name, value in dense.items():
        set_module_tensor_to_device(model, module_name(name), value.device, value=value, dtype=value.dtype)
    if store.geometry.tie_embeddings:
        model.tie_weights()
    if pool.invariant:
        make_invariant(model)
    elif uses_kernels(store.geometry):
        use_half_linear(model)
    if spread is not None:
        spread.put_experts(model, pool, activation)
        spread.connect(model)
    model.lm_head.register_forward_pre_hook(_natural_strides)
    if not pool.holds_all:
        _attach_prefetcher(model, pool, prefetcher)
    model.eval().requires_grad_(False)


def _attach_prefetcher(model: MixtralForCausalLM, pool: Pool, kind: type[Prefetcher]) -> None:
    """Let each layer, and the embeddings before the first, tell the pool what later layers will probably ask for."""
    norms = torch.stack([download(layer.post_attention_layernorm.weight) for layer in model.model.layers])
    gates = torch.stack([download(layer.mlp.gate.weight) for layer in model.model.layers])
    prefetcher = kind(norms, gates, pool.store.geometry.experts_per_token, elsewhere=pool.elsewhere)
    for layer in model.model.layers:
        layer.mlp.experts.prefetcher = prefetcher

    def embedded(module: nn.Module, arguments: object, embeddings: torch.Tensor) -> None:
        pool.prefetch(EMBEDDING, prefetcher.coming(EMBEDDING, embeddings.flatten(0, -2)))

    model.model.embed_tokens.register_forward_hook(embedded)


def rotary_embedding(config: MixtralConfig, where: Path) -> MixtralRotaryEmbedding:
    """Return the rotary embedding that a config describes. Raises StoreError where transformers takes no such one."""
    with _refusals(where):
        return MixtralRotaryEmbedding(config)


def check_frequencies(config: MixtralConfig, where: Path) -> None:
    """Raise StoreError where a config's rope settings give no numbers. Looks at values: not for pretend tensors."""
    rotary = rotary_embedding(config, where)
    with _refusals(where):
        cos, sin = rotary(torch.zeros(1), torch.arange(2)[None])
        if not (cos.isfinite().all() and sin.isfinite().all()):
            raise ValueError("its rope settings give frequencies that are no numbers")


def activation_of(config: MixtralConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an expert's activation."""
    if config.hidden_act == "silu":  # every published Mixtral's; as a function it is done sooner than as a module
        return nn.functional.silu
    activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.hidden_act]
    return activation


def read_dense(store: Store) -> dict[str, torch.Tensor]:
    """All dense weights by published name, read into one mapping and checked; one that is wrong is read once more."""
    layout = store.layout.dense
    start = len(layout.header)
    memory = anonymous_memory(layout.size - start)
    with DirectFile(store.path(layout)) as file, closing(Reader()) as reader:
        reader.submit(Read(file, memory, start, lambda whole: None)).done.result()
    dtype, tensors = HALF[store.layout.dtype], {}
    for name, info in layout.tensors.items():
        raw = memory[info.offset - start : info.offset - start + info.nbytes]
        if xxhash.xxh3_64_hexdigest(raw.numpy().data) != store.dense_checksums.get(name):
            fill_from_disk(store, {name: raw}, attempts=1)
        tensors[name] = raw.view(dtype).view(info.shape)
    return tensors


def _natural_strides(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The last position, cut out of a chunk's hidden states, with the strides of a tensor of its own.

    As it is cut, [1, 1, H] has the stride of the whole chunk, and torch 2.13 then multiplies it as a batch of one,
    by way of a copy of the head's weight: 30 times slower, and as much memory again as the weight.
    """
    (hidden,) = arguments
    return (hidden.reshape(-1).view(hidden.shape),)


def module_name(published: str) -> str:
    """transformers 5 calls the mixture of experts `mlp`."""
    return published.replace(".block_sparse_moe.", ".mlp.")


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises about the content of a file into one line that names it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
        raise StoreError(
            f"{path}: transformers does not take it ({reason[:200]}); correct it or fetch it again"
        ) from None
