"""`runner.model` used as any model of transformers: gradients, counts, copies; right, or refused in one line."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint, reference_model
from stores import make_model, make_store
from torch.autograd import forward_ad
from transformers import MixtralForCausalLM

from qmix.errors import UsageError
from qmix.kernels.cpu.attention import BLOCK
from qmix.model.attention import grouped_sdpa
from qmix.model.kv import KVCache
from qmix.precision.dense import HalfLinear

MIXED = "nf4,*.1=int8,*.2=half,*.3=fp4"
PRECISIONS = ["nf4", "fp4", "int8", "half", MIXED]
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixed")
    return make_store(make_checkpoint(directory / "checkpoint"), directory / "store", MIXED)


def loss_of(model, **inputs):
    return model(**inputs).logits.float().square().mean()


def embeddings(tokens=12, dtype=torch.float32):
    numbers = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    return numbers.to(dtype).requires_grad_()


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("tokens", [12, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_inputs_are_those_of_a_plain_model_with_the_dequantised_weights(tmp_path, precision, tokens):
    """With two slots: what a forward pass multiplied is long gone when the backward pass comes."""
    model = make_model(make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", precision), slots=2)
    model.save_pretrained(tmp_path / "plain")
    found = []
    for each in (reference_model(tmp_path / "plain"), reference_model(tmp_path / "plain", torch.bfloat16), model):
        x = embeddings(tokens, each.dtype)
        loss_of(each, inputs_embeds=x).backward()
        found.append(x.grad)
    exact, theirs, ours = found
    assert relative(ours, exact) < max(1.25 * relative(theirs, exact), 0.02)


def test_gradients_of_dense_weights_are_those_of_a_plain_model(store, tmp_path):
    model = make_model(store, slots=2)
    model.save_pretrained(tmp_path / "plain")
    exact, theirs = reference_model(tmp_path / "plain"), reference_model(tmp_path / "plain", torch.bfloat16)
    model.requires_grad_(True)
    for each in (exact, theirs, model):
        loss_of(each.train(), input_ids=IDS).backward()
    wanted, half = dict(exact.named_parameters()), dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        want = wanted[name].grad
        assert relative(weight.grad, want) < max(1.5 * relative(half[name].grad, want), 0.02), name


def test_gradients_with_checkpointing_are_the_same(store):
    model, found = make_model(store, slots=2).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        x = embeddings(dtype=torch.bfloat16)
        loss_of(model, inputs_embeds=x, use_cache=False).backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_gradients_of_gradients_are_refused(store):
    x = embeddings(dtype=torch.bfloat16)
    model = make_model(store, attention="eager")
    (first,) = torch.autograd.grad(loss_of(model, inputs_embeds=x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_weight_large_enough_for_the_kernels_gets_its_gradient(dtype):
    x = torch.randn(3, 1024).to(dtype)
    layer = HalfLinear(1024, 1024, bias=False, dtype=dtype)
    layer(x).float().sum().backward()
    plain = layer.weight.detach().clone().requires_grad_()
    F.linear(x, plain).float().sum().backward()
    assert torch.equal(layer.weight.grad, plain.grad)


def test_a_mask_of_a_long_cache_gets_its_gradient():
    query, key = torch.randn(1, 4, 1, 64).bfloat16(), torch.randn(1, 2, 8 * BLOCK, 64).bfloat16()
    mask = torch.zeros(1, 1, 1, 8 * BLOCK, dtype=torch.bfloat16).requires_grad_()
    out, _ = grouped_sdpa(torch.nn.Module(), query, key, key, mask, scaling=0.1)
    out.float().square().sum().backward()
    assert mask.grad.abs().sum() > 0


@pytest.mark.parametrize("tokens", [1, 5])
def test_training_drops_attention_weights(tokens):
    query, key = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, 5, 16)
    whole, _ = grouped_sdpa(torch.nn.Module(), query, key, key, torch.zeros(1, 1, tokens, 5))
    none, _ = grouped_sdpa(torch.nn.Module(), query, key, key, torch.zeros(1, 1, tokens, 5), dropout=1.0)
    assert whole.abs().min() > 0
    assert none.abs().max() == 0


def test_a_planned_cache_takes_no_gradients(store):
    cache = KVCache(store.geometry, 16, torch.bfloat16)
    model = make_model(store)
    with pytest.raises(UsageError, match="keeps no gradients"):
        model(inputs_embeds=embeddings(dtype=torch.bfloat16), cache=cache)
    assert not cache.layers[0].keys.requires_grad


def forward_mode(model):
    model.set_attn_implementation("eager")
    with forward_ad.dual_level():
        x = embeddings(dtype=torch.bfloat16).detach()
        model(inputs_embeds=forward_ad.make_dual(x, torch.ones_like(x)))


REFUSED = {
    "float": (lambda model: model.float(), "computes in torch.bfloat16"),
    "half": (lambda model: model.half(), "another dtype"),
    "double": (lambda model: model.double(), "computes in torch.bfloat16"),
    "to a type": (lambda model: model.to(torch.float32), "computes in torch.bfloat16"),
    "to a device": (lambda model: model.to("meta"), "devices are those of its plan"),
    "to_empty": (lambda model: model.to_empty(device="cpu"), "forget the dense weights"),
    "deepcopy": (copy.deepcopy, "cannot be copied or pickled"),
    "deepcopy of a part": (lambda model: copy.deepcopy(model.model.layers[0]), "cannot be copied or pickled"),
    "copy": (copy.copy, "cannot be copied or pickled"),
    "pickle": (pickle.dumps, "save_pretrained"),
    "torch.save": (lambda model: torch.save(model, "/dev/null"), "save_pretrained"),
    "state_dict": (lambda model: model.state_dict(), "save_pretrained"),
    "state_dict of a part": (lambda model: model.model.state_dict(), "save_pretrained"),
    "load_state_dict": (lambda model: model.load_state_dict({}, strict=False), "qmix.load"),
    "load_state_dict of a part": (lambda model: model.model.load_state_dict({}, strict=False), "qmix.load"),
    "resize": (lambda model: model.resize_token_embeddings(100), "vocabulary is the store's"),
    "generate_batch": (lambda model: model.generate_batch([[3, 4]]), "qmix batch"),
    "continuous": (lambda model: model.init_continuous_batching(), "qmix batch"),
    "continuous context": (lambda model: model.continuous_batching_context_manager(), "qmix batch"),
    "push_to_hub": (lambda model: model.push_to_hub("org/name"), "hf upload"),
    "from_pretrained": (lambda model: type(model).from_pretrained("."), "qmix.load"),
    "compile": (lambda model: model.compile(), "call the model itself"),
    "trace": (lambda model: torch.jit.trace(model, (IDS,), strict=False), "neither traced nor exported"),
    "forward mode": (forward_mode, "forward-mode"),
}


@pytest.mark.parametrize(("use", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_in_one_line_and_changes_nothing(store, use, says):
    model = make_model(store)
    with torch.no_grad():
        want = model(IDS).logits
        with pytest.raises(UsageError, match=says) as refused:
            use(model)
        assert "\n" not in str(refused.value)
        model.set_attn_implementation("qmix_grouped_sdpa")
        assert torch.equal(model(IDS).logits, want)


@pytest.mark.slow
def test_torch_compile_is_refused_when_it_is_called(store):
    for part in (make_model(store), make_model(store).model):
        with torch.no_grad(), pytest.raises(UsageError, match=r"torch\.compile"):
            torch.compile(part)(IDS)


def test_conversions_that_change_nothing_are_taken(store):
    model = make_model(store)
    places = [weight.data_ptr() for weight in model.parameters()]
    assert model.to("cpu").bfloat16().to(torch.bfloat16).cpu() is model
    model.tie_weights()
    assert [weight.data_ptr() for weight in model.parameters()] == places


def test_counts_are_a_plain_models(store, tmp_path):
    model = make_model(store, slots=3)
    model.save_pretrained(tmp_path / "plain")
    plain = reference_model(tmp_path / "plain", torch.bfloat16)
    assert model.num_parameters() == plain.num_parameters() == 2 * 4 * 3 * 64 * 128 + 37_696
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    model.lm_head.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == 96 * 64
    # 37,696 dense weights in bf16; two rotary buffers of 8 in fp32; three slots for each of the sizes of record
    slots = sum(3 * nbytes for nbytes in store.layout.record_counts)
    assert model.get_memory_footprint(return_buffers=False) == 2 * 37_696 + slots
    assert model.get_memory_footprint() == 2 * 37_696 + slots + 2 * 8 * 4


def test_the_model_is_transformers_own_by_class_and_by_name(store):
    model = make_model(store)
    assert isinstance(model, MixtralForCausalLM)
    assert type(model).__name__ == "MixtralForCausalLM"
    want = F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=IDS).loss.float(), want)


@pytest.mark.parametrize("slots", [2, None])
def test_a_model_whose_pool_is_closed_says_so(store, slots, tmp_path):
    model = make_model(store, slots)
    loss = loss_of(model, inputs_embeds=embeddings(dtype=torch.bfloat16))
    model.pool.close()
    for use in (
        lambda: model(IDS),
        lambda: model.model(IDS),
        lambda: model.generate(IDS, max_new_tokens=2),
        lambda: model.save_pretrained(tmp_path / "checkpoint"),
        loss.backward,
    ):
        with pytest.raises(UsageError, match="closed; load the model again"):
            use()
