"""One token through all layers in one call: the numbers of a layer at a time, and who gets the layers one by one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_model, make_store
from torch import nn

from qmix.errors import Cancelled
from qmix.kernels.cpu import team
from qmix.model.decoder_layer import OneTokenLayer
from qmix.model.kv import KVCache
from qmix.precision import formats, matmul

SHAPES = {
    "plain": {},
    "wide heads, three experts a token": {"head_dim": 48, "num_local_experts": 6, "num_experts_per_tok": 3},
    "odd sizes": {"hidden_size": 70, "intermediate_size": 90},
}
PRECISIONS = ("nf4", "int8", "half", "nf4,0.1=half,1.2=int8,1.3=int8")
STEPS = 6


@pytest.fixture(autouse=True)
def kernels_for_any_size(monkeypatch):
    """Small models are computed as large ones are."""
    for module in (formats, matmul):
        monkeypatch.setattr(module, "KERNEL_WEIGHTS", 0)


def model_of(tmp_path, precision: str = "nf4", **changes: Any) -> Any:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", max_position_embeddings=1024, **changes)
    model = make_model(make_store(checkpoint, tmp_path / f"store-{precision}", precision))
    model.pool.fill()
    return model


class _Served:
    """Counts the forwards that `steps` of a model serves."""

    def __init__(self, model: Any) -> None:
        self.count, serve = 0, model.steps.forward

        def forward(ids: Any, options: dict[str, Any]) -> Any:
            found = serve(ids, options)
            self.count += found is not None
            return found

        model.steps.forward = forward


def logits(model: Any, prompt: int = 9, **options: Any) -> torch.Tensor:
    """[STEPS, V] of single tokens after a prompt."""
    ids = torch.randint(3, 96, (1, prompt + STEPS), generator=torch.Generator().manual_seed(prompt))
    cache, found = KVCache(model.pool.store.geometry, 1024, torch.bfloat16), []
    with torch.inference_mode():
        model(ids[:, :prompt], cache=cache, use_cache=True)
        for at in range(prompt, prompt + STEPS):
            found.append(model(ids[:, at : at + 1], cache=cache, use_cache=True, **options).logits[0, -1])
    assert {layer.length for layer in cache.layers} == {prompt + STEPS}
    return torch.stack(found)


def layer_by_layer(model: Any) -> Any:
    model.steps = None
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_to_the_bit_those_of_a_layer_at_a_time(tmp_path, changes, precision):
    model = model_of(tmp_path, precision, **changes)
    served = _Served(model)
    ours = logits(model)
    kernels = changes.get("hidden_size") is None  # without, rows are dequantised
    assert served.count == (STEPS if kernels or precision in ("int8", "half") else 0)
    assert torch.equal(ours, logits(layer_by_layer(model)))


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_and_several_blocks_of_positions(tmp_path, threads, monkeypatch):
    model = model_of(tmp_path)
    expected = logits(layer_by_layer(model), prompt=530)
    model = model_of(tmp_path)
    monkeypatch.setattr(team, "threads", lambda: threads)
    for _ in range(3):
        assert torch.equal(logits(model, prompt=530), expected)


def test_equal_logits_of_the_router_take_the_first_expert(tmp_path):
    """Four experts have the same router row: 0 and 1 are chosen."""
    model = model_of(tmp_path)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.copy_(layer.mlp.gate.weight[:1].expand(4, -1).clone())
    seen: list[list[list[int]]] = []
    model.pool.used, used = lambda chosen, seconds: (seen.append(chosen), used(chosen, seconds)), model.pool.used
    logits(model)
    assert seen == [[[0, 1]] * 2] * STEPS


def test_the_pool_counts_what_a_layer_at_a_time_counts(tmp_path):
    model, counts = model_of(tmp_path), []
    for change in (lambda model: model, layer_by_layer):
        change(model)
        before = model.pool.counters.copy()
        asked = [list(row) for row in model.pool.by_expert.asked]
        logits(model)
        now = [
            [b - a for a, b in zip(*rows, strict=True)] for rows in zip(asked, model.pool.by_expert.asked, strict=True)
        ]
        counts.append((model.pool.counters.since(before), now))
    assert counts[0] == counts[1]
    again = model_of(tmp_path)
    for _ in range(2):
        logits(layer_by_layer(again))
    rates = [[each.pool.policy.rate((1, expert)) for expert in range(4)] for each in (model, again)]
    assert rates[0] == rates[1]


def hooked(model: Any, seen: list[int]) -> None:
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))


def hooked_before(model: Any, seen: list[int]) -> None:
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: seen.append(1))


class _Adapter(nn.Module):
    """A module in the place of another, as adapters are."""

    def __init__(self, inside: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.inside, self.seen = inside, seen

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.seen.append(1)
        return self.inside(*arguments, **options)


def adapted(model: Any, seen: list[int]) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj = _Adapter(attention.o_proj, seen)


def another_forward(model: Any, seen: list[int]) -> None:
    layer = model.model.layers[0]
    layer.forward, forward = lambda *given, **options: (seen.append(1), forward(*given, **options))[1], layer.forward


LOOKING: dict[str, Callable[[Any, list[int]], None]] = {
    "a hook": hooked,
    "a hook before": hooked_before,
    "a module in another's place": adapted,
    "another forward": another_forward,
}


@pytest.mark.parametrize("look", LOOKING.values(), ids=LOOKING)
def test_who_looks_gets_the_layers_one_by_one(tmp_path, look):
    model, seen = model_of(tmp_path), []
    expected = logits(model)
    served = _Served(model)
    look(model, seen)
    difference = (logits(model) - expected).float().pow(2).mean(1).sqrt().median()
    assert difference < 0.02 * expected.float().std()  # one layer is transformers' own, with other sums
    assert (len(seen), served.count) == (1 + STEPS, 0)


@pytest.mark.parametrize("option", ["output_router_logits", "output_hidden_states"])
def test_recorded_outputs_are_recorded(tmp_path, option):
    model = model_of(tmp_path)
    cache = KVCache(model.pool.store.geometry, 16, torch.bfloat16)
    with torch.inference_mode():
        assert getattr(model(torch.tensor([[5]]), cache=cache), option.removeprefix("output_")) is None
        assert getattr(model(torch.tensor([[5]]), cache=cache, **{option: True}), option.removeprefix("output_"))
        setattr(model.config, option, True)
        assert getattr(model(torch.tensor([[5]]), cache=cache), option.removeprefix("output_"))


def test_the_embedding_stays_its_module_s(tmp_path):
    """A step writes neither to an output that a hook keeps, nor to a weight that a module returns without a copy."""
    model, seen = model_of(tmp_path), []
    expected, served = logits(model), _Served(model)
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append((out, out.clone())))
    assert torch.equal(logits(model), expected)
    assert served.count == STEPS
    assert all(torch.equal(kept, copy) for kept, copy in seen)


def test_an_embedding_in_another_type_is_left_to_transformers(tmp_path):
    model = model_of(tmp_path)
    served, cache = _Served(model), KVCache(model.pool.store.geometry, 16, torch.bfloat16)
    embed = model.model.embed_tokens
    embed.weight.data = embed.weight.data.float()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"dtype|type"):
        model(torch.tensor([[5]]), cache=cache)
    assert served.count == 0


def test_weights_that_were_changed_count(tmp_path):
    """In place, and by other memory."""
    model = model_of(tmp_path)
    before = logits(model)
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data.mul_(2)
    in_place = logits(model)
    weight.data = weight.data * 0.5
    assert not torch.equal(before, in_place)
    assert torch.equal(logits(model), before)


def test_an_expert_that_is_not_in_memory_is_read_by_its_layer(tmp_path):
    model = model_of(tmp_path)
    expected = logits(model)
    model = make_model(model.pool.store)  # nothing is read yet
    served, cache = _Served(model), KVCache(model.pool.store.geometry, 16, torch.bfloat16)
    with torch.inference_mode():
        model(torch.tensor([[5]]), cache=cache)
    assert (served.count, len(model.pool.held())) == (0, 4)
    assert torch.equal(logits(model), expected)  # the prompt reads all
    assert served.count == STEPS


def test_a_sliding_window_gradients_and_other_caches_are_left_to_transformers(tmp_path):
    for changes, window in (({}, None), ({"sliding_window": 12}, 12)):
        model = model_of(tmp_path / str(window), **changes)
        served = _Served(model)
        logits(model)
        assert served.count == (0 if window else STEPS)
    model = model_of(tmp_path / "None")
    served = _Served(model)
    token = torch.tensor([[5]])
    model(token, cache=KVCache(model.pool.store.geometry, 16, torch.bfloat16))  # gradients are on
    with torch.inference_mode():
        model(token)
        model(torch.cat([token, token]), cache=KVCache(model.pool.store.geometry, 16, torch.bfloat16, batch=2))
        mask = torch.tensor([[0, 1]])
        cache = KVCache(model.pool.store.geometry, 16, torch.bfloat16)
        model(token, cache=cache, attention_mask=mask[:, 1:])
        assert served.count == 1
        model(token, cache=cache, attention_mask=mask)  # one position is hidden
    assert served.count == 1


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_model_that_is_let_go_of_is_freed_at_once(tmp_path):
    """Freeing memory and files needs no collection of cycles."""
    gc.collect()
    gc.disable()
    try:
        before = open_files()
        model = model_of(tmp_path)
        logits(model)
        held = weakref.ref(model), weakref.ref(model.pool)
        assert open_files() > before
        del model
        assert [each() for each in held] == [None, None]
        assert open_files() <= before
    finally:
        gc.enable()


def test_a_stopped_model_takes_no_step(tmp_path):
    model = model_of(tmp_path)
    logits(model)
    model.pool.cancelled = True
    with pytest.raises(Cancelled):
        logits(model)


def test_a_token_is_one_call_whatever_the_layers(tmp_path, monkeypatch):
    calls, run = [], team.run
    monkeypatch.setattr(team, "run", lambda *arguments: (calls.append(1), run(*arguments)))
    for layers in (2, 4):
        model = model_of(tmp_path / str(layers), num_hidden_layers=layers)
        assert all(type(layer) is OneTokenLayer for layer in model.model.layers)
        cache = KVCache(model.pool.store.geometry, 64, torch.bfloat16)
        with torch.inference_mode():
            model(torch.tensor([[7]]), cache=cache, use_cache=True)
            calls.clear()
            model(torch.tensor([[7]]), cache=cache, use_cache=True)
        assert len(calls) == 2  # all layers, and the head
