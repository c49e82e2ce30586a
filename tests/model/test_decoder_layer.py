"""One token's short way through a layer: transformers' numbers, its hooks, and how little is called for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_model, make_store
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from qmix.kernels.cpu import team
from qmix.model.decoder_layer import OneTokenLayer
from qmix.model.kv import KVCache
from qmix.precision import formats, matmul

SHAPES = {
    "plain": {},
    "wide heads, three experts a token": {"head_dim": 48, "num_local_experts": 6, "num_experts_per_tok": 3},
    "every head its own key": {"num_key_value_heads": 4},
    "odd sizes": {"hidden_size": 70, "intermediate_size": 90},
    "sliding window": {"sliding_window": 12},
}
STEPS = 6


@pytest.fixture(autouse=True)
def kernels_for_any_size(monkeypatch):
    """Small models are computed as large ones are."""
    for module in (formats, matmul):
        monkeypatch.setattr(module, "KERNEL_WEIGHTS", 0)


def model_of(tmp_path, precision: str = "nf4", **changes) -> Any:
    """A model that takes its layers one by one."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", max_position_embeddings=1024, **changes)
    model = make_model(make_store(checkpoint, tmp_path / f"store-{precision}", precision))
    model.steps = None
    return model


def steps(model: Any, prompt: int) -> tuple[torch.Tensor, KVCache]:
    """Logits [STEPS, V] of single tokens after a prompt, and the cache."""
    ids = torch.randint(3, 96, (1, prompt + STEPS), generator=torch.Generator().manual_seed(prompt))
    cache, found = KVCache(model.pool.store.geometry, 1024, torch.bfloat16), []
    with torch.inference_mode():
        model(ids[:, :prompt], cache=cache, use_cache=True)
        for at in range(prompt, prompt + STEPS):
            found.append(model(ids[:, at : at + 1], cache=cache, use_cache=True).logits[0, -1])
    return torch.stack(found).float(), cache


def as_transformers(model: Any) -> None:
    for layer in model.model.layers:
        assert type(layer) is OneTokenLayer
        layer.__class__ = MixtralDecoderLayer


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prompt", [9, 530])
def test_logits_and_cache_are_those_of_transformers_layer(tmp_path, prompt, changes):
    """530 positions are more than one block of the attention kernel."""
    model = model_of(tmp_path, **changes)
    ours, our_cache = steps(model, prompt)
    as_transformers(model)
    theirs, their_cache = steps(model, prompt)
    difference = (ours - theirs).pow(2).mean(1).sqrt().median()  # of steps: two nearly equal experts may change places
    assert difference < 0.02 * theirs.std()
    for mine, other in zip(our_cache.layers, their_cache.layers, strict=True):
        assert mine.length == other.length == prompt + STEPS
    first, other = our_cache.layers[0], their_cache.layers[0]  # before any expert
    torch.testing.assert_close(first.keys, other.keys, rtol=0.02, atol=0.01)
    torch.testing.assert_close(first.values, other.values, rtol=0.02, atol=0.01)


def test_hooks_recorded_outputs_and_gradients_get_transformers_layer(tmp_path):
    model = model_of(tmp_path)
    seen = []
    layer = model.model.layers[1]
    handle = layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    steps(model, 5)
    assert len(seen) == 1 + STEPS
    handle.remove()
    steps(model, 5)
    assert len(seen) == 1 + STEPS
    cache = KVCache(model.pool.store.geometry, 16, torch.bfloat16)
    with torch.inference_mode():
        out = model(torch.tensor([[5]]), cache=cache, output_router_logits=True, output_attentions=False)
    assert [logits.shape for logits in out.router_logits] == [(1, 4), (1, 4)]
    layer.input_layernorm.weight.requires_grad_()
    model(torch.tensor([[5]])).logits.sum().backward()
    assert layer.input_layernorm.weight.grad.abs().sum() > 0


def test_what_the_kernel_cannot_read_goes_to_transformers_layer(tmp_path):
    """Rows with gaps between their numbers; angles for a part of a head only, which transformers refuses."""
    model = model_of(tmp_path)
    rows = torch.randn(1, 1, 2 * model.config.hidden_size).bfloat16()[..., ::2]
    found = []
    with torch.inference_mode():
        for embedded in (rows, rows.contiguous()):
            cache = KVCache(model.pool.store.geometry, 16, torch.bfloat16)
            found.append(model(inputs_embeds=embedded, cache=cache, use_cache=True).logits.float())
        torch.testing.assert_close(*found, rtol=0.1, atol=0.1)
        narrow = [angles[..., :-16] for angles in model.model.rotary_emb(rows, torch.zeros(1, 1, dtype=torch.int64))]
        with pytest.raises(RuntimeError, match="size"):
            model.model.layers[0](rows.contiguous(), position_embeddings=narrow, cache=cache)


class _Operations(TorchDispatchMode):
    """Counts what reaches torch's kernels."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _counted(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """Return a step's calls of the thread team, torch's operations, and calls of Python functions."""
    calls, run = [], team.run
    monkeypatch.setattr(team, "run", lambda *arguments: (calls.append(1), run(*arguments)))
    with _Operations() as operations:
        step()
    team_calls = len(calls)
    monkeypatch.setattr(team, "run", run)
    functions = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal functions
        functions += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return team_calls, operations.count, functions


@pytest.mark.parametrize("precision", ["nf4", "int8", "half"])
def test_a_tokens_barriers_and_calls(tmp_path, monkeypatch, precision):
    """Two calls of the thread team a layer, and one for the head."""
    counts = []
    for layers in (2, 4):
        directory = tmp_path / str(layers)
        model = model_of(directory, precision, num_hidden_layers=layers)
        cache = KVCache(model.pool.store.geometry, 64, torch.bfloat16)

        def step(model: Any = model, cache: KVCache = cache) -> None:
            model(torch.tensor([[7]]), cache=cache, use_cache=True)

        with torch.inference_mode():
            step()
            counts.append(_counted(step, monkeypatch))
    (team_calls, *_), _ = counts
    a_layer = [(many - few) / 2 for few, many in zip(*counts, strict=True)]
    assert team_calls == 2 * 2 + 1
    assert a_layer[0] == 2
    assert a_layer[1] <= 30
    assert a_layer[2] <= 120
