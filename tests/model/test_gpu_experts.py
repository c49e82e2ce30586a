"""The modules of a GPU run with the CPU as every device: their values and their moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from spreads import spread_plan
from stores import make_model, make_pool, make_store

from qmix.engine.stream import Runner
from qmix.errors import StoreError, UsageError
from qmix.kernels.gpu.shapes import DENSE_FROM
from qmix.machine.rates import Rates
from qmix.model.build import build_model
from qmix.model.gpu.experts import DeviceExperts, KernelExpert, TokensByExpert
from qmix.model.gpu.spread import spread_for
from qmix.model.kv import KVCache

COPIES = Rates(pcie=1e18, gpu_memory=1e18, gpu_matmul=1e21)  # by these copying always pays
COMPUTES = Rates(pcie=1.0)
TWO = ["gpu:0", "gpu:1"]


def logits(model, ids, cache=None):
    """Return logits [T, V] in fp32 of a prompt in one step, then of three steps of a token each."""
    with torch.inference_mode():
        parts = [model(ids[:, :-3], cache=cache, use_cache=True)]
        cache = cache or parts[0].cache
        parts += [model(ids[:, end - 1 : end], cache=cache, use_cache=True) for end in range(18, 21)]
    return torch.cat([part.logits[0] for part in parts]).float()


def spread_model(store, layer_devices, residents, rates=COMPUTES, slots=2):
    plan = spread_plan(store.layout, layer_devices, residents, slots)
    spread = spread_for(plan, rates, "cpu")
    pool = make_pool(store, slots, elsewhere=spread.residents)
    return build_model(store, pool, "sdpa", spread)


@pytest.fixture
def ids():
    return torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rates", [COPIES, COMPUTES], ids=["copies", "computes"])
@pytest.mark.parametrize(
    ("layer_devices", "residents"),
    [(TWO, {0, 1}), (TWO, set()), (TWO, {0, 1, 2, 3}), (["cpu", "gpu:0"], {2}), (["gpu:0", "gpu:0"], {1, 3})],
    ids=["two", "two, none resident", "two, all resident", "CPU and one", "one"],
)
def test_a_model_over_devices_gives_the_logits_of_one_on_the_cpu(tmp_path, ids, layer_devices, residents, rates):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "half")
    model = spread_model(store, layer_devices, residents, rates)
    cache = KVCache(store.geometry, 20, torch.bfloat16, 1, [torch.device("cpu")] * 2)
    want = logits(make_model(store), ids)
    torch.testing.assert_close(logits(model, ids, cache), want, rtol=0, atol=0.02 * want.std().item())


@pytest.mark.parametrize("rates", [COPIES, COMPUTES], ids=["copies", "computes"])
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "nf4,0.*=int8,1.1=half,1.2=fp4", "nf4,*.2=half"])
def test_quantised_experts_over_devices_are_as_close_to_transformers(tmp_path, ids, precision, rates):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    store = make_store(checkpoint, tmp_path / "store", precision)
    exact = logits(reference_model(checkpoint), ids)
    ours = (logits(spread_model(store, TWO, {0, 2}, rates), ids) - exact).pow(2).mean(-1).sqrt().median()
    host = (logits(make_model(store), ids) - exact).pow(2).mean(-1).sqrt().median()
    assert ours <= 1.1 * host


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"hidden_size": 65, "intermediate_size": 31}])
def test_other_shapes(tmp_path, ids, changes):
    store = make_store(make_checkpoint(tmp_path / "checkpoint", **changes), tmp_path / "store")
    want = logits(make_model(store), ids)
    got = logits(spread_model(store, TWO, {0, 1}, COPIES), ids)
    assert (got - want).pow(2).mean(-1).sqrt().median() < 0.02 * want.std()


def test_sentences_of_the_embedded_model_over_two_devices(tiny, tmp_path):
    store = make_store(tiny, tmp_path / "store", "int8")
    plan = replace(spread_plan(store.layout, ["gpu:0"] * 3 + ["gpu:1"] * 3, {0, 3, 5}, slots=4), context=64)
    host = replace(plan, devices=(), layer_devices=("cpu",) * 6, placement=(("disk",) * 8,) * 6)
    answers = []
    for made in (plan, host):
        with Runner(store, made, kind="cpu") as runner:
            answers.append(runner.complete("Click the button to", temperature=0, max_new_tokens=16).text)
    assert answers[0] == answers[1] != ""


def test_residents_take_no_slot_and_the_pool_serves_the_others_alone(tmp_path, ids):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    model = spread_model(store, TWO, {0, 1}, slots=4)
    pool = model.model.layers[0].mlp.experts.pool
    assert pool.holds_all
    assert (pool.counters.hits, pool.counters.misses) == (0, 0)
    pool.fill()
    with torch.inference_mode():
        model(ids)
    assert pool.counters.misses == 0
    assert pool.counters.bytes_read == sum(
        store.layout.record(layer, expert).nbytes for layer in range(2) for expert in range(4)
    )


def test_a_damaged_record_and_a_damaged_weight_are_found_on_the_way_to_a_gpu(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    for file, offset, named in (
        (store.layout.layer(1), store.layout.record_offset(1, 2) + 100, r"expert 2 \(bytes \d+ to \d+\) is damaged"),
        (store.layout.dense, store.layout.dense.tensors["model.norm.weight"].offset, r"model.norm.weight.* is damaged"),
    ):
        whole = store.path(file).read_bytes()
        store.path(file).write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        with pytest.raises(StoreError, match=named):
            spread_model(store, TWO, {2})
        store.path(file).write_bytes(whole)


def test_a_plan_for_gpus_that_are_not_here_is_refused(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    plan = spread_plan(store.layout, ["gpu:7", "gpu:7"], {0})
    with pytest.raises(UsageError, match=r"the plan uses gpu:7, and torch finds \d+ CUDA devices? here"):
        spread_for(plan, Rates(), "cuda")


def test_an_expert_away_from_its_layer_is_refused(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    plan = spread_plan(store.layout, TWO, {0})
    swapped = replace(plan, placement=plan.placement[::-1])
    with pytest.raises(UsageError, match="expert 0 of layer 0 is on gpu:1 and its layer on gpu:0"):
        spread_for(swapped, Rates(), "cpu")


def test_routing_by_hand():
    routing = TokensByExpert([[3, 0], [0, 1], [3, 1]])
    # pairs 0..5 go to 3 0 0 1 3 1
    assert {expert: routing.pairs(expert) for expert in routing.spans} == {0: [1, 2], 1: [3, 5], 3: [0, 4]}
    assert routing.count(3) == 2


def test_the_way_is_chosen_by_tokens_and_rates(tmp_path, ids):
    """If only many tokens are worth a copy, a prompt's experts are copied and a single token's are not."""
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    rates = Rates(four_bit_read=1e12, matmul=1e9, pcie=1.6e8, gpu_memory=1e12, gpu_matmul=1e15)
    model = spread_model(store, TWO, set(), rates)
    ways = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        assert isinstance(experts, DeviceExperts)
        for way in ("_on_host", "_on_device"):
            run = getattr(experts, way)
            setattr(experts, way, lambda *args, run=run, way=way: (ways.append(way), run(*args)))
    with torch.inference_mode():
        model(ids)
        assert ways == ["_on_device"] * 2
        model(ids[:, :1])
    assert ways[2:] == ["_on_host"] * 2


@pytest.mark.parametrize(("dense_from", "ways"), [(33, "iiddd"), (8, "ddddd"), (1000, "iiiid")])
def test_few_tokens_multiply_a_record_in_place_and_many_by_way_of_a_buffer(dense_from, ways):
    """Never in place beyond the tokens that the plan has counted work space for."""
    taken = []

    class Kernels:
        def in_place(self, shape, record, x):
            taken.append("i")
            return x

        def dense(self, shape, record, x, buffer):
            taken.append("d")
            return x

    expert = KernelExpert(Kernels(), None, torch.zeros(1), torch.zeros(1), dense_from)
    for tokens in (8, 32, 33, 256, 257):
        assert len(expert(torch.zeros(tokens, 2), torch.nn.functional.silu)) == tokens
    assert "".join(taken) == ways


def test_the_measured_choice_reaches_the_experts_of_each_precision(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "nf4,*.1=fp4")
    spread = spread_for(spread_plan(store.layout, TWO, {0, 1}), COMPUTES, "cpu")
    spread.dense_from = {"nf4": 16}
    model = build_model(store, make_pool(store, 2, elsewhere=spread.residents), "sdpa", spread)
    loader = model.model.layers[0].mlp.experts.loader
    loader.kernels = object()
    record = torch.zeros(1)
    assert [loader.expert(kind, record).dense_from for kind in ("nf4", "fp4")] == [16, DENSE_FROM]


@pytest.fixture
def cudnn_attention():
    """Turn torch's setting for the whole process on, its default, and restore it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("cudnn_attention")
def test_cudnns_attention_is_off_for_a_model_on_a_gpu(tmp_path):
    """cuDNN plans anew for each length of the KV cache, and in decode every token has a new length."""
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "half")
    make_model(store)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    spread_model(store, ["cpu", "gpu:0"], {0})
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("rates", [COPIES, COMPUTES], ids=["copies", "computes"])
def test_gradients_go_through_experts_wherever_they_lie(tmp_path, rates):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "nf4,*.1=int8,*.2=half,*.3=fp4")
    found = []
    for model in (make_model(store), spread_model(store, TWO, {0, 1}, rates)):
        x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
        model(inputs_embeds=x).logits.float().square().mean().backward()
        found.append(x.grad.float())
    host, spread = found
    assert (spread - host).norm() < 0.03 * host.norm()


def test_what_is_held_counts_residents_and_the_loaders_memory_once(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "half")
    model = spread_model(store, ["gpu:0", "gpu:0"], {1, 3}, COPIES)
    host = make_model(store, slots=2)
    record = 2 * 3 * 64 * 128  # in half precision: no more on a GPU than in main memory
    staged = 2 * store.layout.record(0, 0).nbytes
    assert model.get_memory_footprint() - host.get_memory_footprint() == 2 * 2 * record + staged
