"""Pinned memory is unlocked once nothing reads it, and the host's part of a step sees its own tokens only."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import torch
from checkpoints import make_checkpoint
from spreads import spread_plan
from stores import make_pool, make_store
from torch.nn.functional import silu

from qmix.machine.rates import Rates
from qmix.model.build import build_model
from qmix.model.gpu.away import AwayExperts, Exchange
from qmix.model.gpu.devices import Device, Mark, pin
from qmix.model.gpu.kernels import expert_shapes
from qmix.model.gpu.spread import spread_for
from qmix.pool.experts import ExpertPool


class Cuda:
    """A device, and CUDA's runtime, which notes what is called."""

    def __init__(self, status):
        self.calls = []
        self.runtime = SimpleNamespace(
            cudaHostRegister=lambda address, nbytes, flags: self.calls.append(("lock", address, nbytes)) or status,
            cudaHostUnregister=lambda address: self.calls.append(("unlock", address)),
        )

    def upload(self, tensor):
        return tensor

    def wait(self):
        self.calls.append("wait")


def test_memory_is_unlocked_after_the_copies_that_read_it(monkeypatch):
    cuda, memory = Cuda(0), torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda.runtime)
    unpin = pin(memory, [cuda, cuda])
    assert unpin is not None
    unpin()
    address = memory.data_ptr()
    assert cuda.calls == [("lock", address, 64), "wait", "wait", ("unlock", address)]


def test_memory_that_the_system_does_not_lock_is_not_unlocked(monkeypatch):
    cuda = Cuda(2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda.runtime)
    assert pin(torch.zeros(64, dtype=torch.uint8), [cuda]) is None


def test_guesses_are_made_from_the_rows_with_a_token(tmp_path, monkeypatch):
    """A step of four rows has two tokens; the others' x is that of an earlier step."""
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    spread = spread_for(spread_plan(store.layout, ["gpu:0"] * 2, {0}), Rates(), "cpu")
    experts = (
        build_model(store, make_pool(store, 2, elsewhere=spread.residents), "sdpa", spread).model.layers[0].mlp.experts
    )
    seen = []
    groups = experts.groups
    monkeypatch.setattr(
        experts, "groups", lambda chosen, away, x: (seen.append((chosen, away, len(x))), groups(chosen, away, x))[1]
    )
    x, results = torch.randn(4, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    ids = torch.tensor([[0, 2], [3, 2], [-1, -1], [-1, -1]])
    AwayExperts(experts, expert_shapes(store.layout), Rates(), None).compute(Exchange(ids, x, results, {}), 4)
    assert seen == [([0, 2, 3], [2, 3], 2)]
    assert [bool(row.any()) for row in results] == [False, True, True, True, False, False, False, False]


def test_a_mark_is_polled_at_first_and_then_waited_for_without_pythons_lock(monkeypatch):
    """A short piece of work is found by queries; for a long one other threads run."""
    calls, clock = [], iter(range(10))

    class Event:
        def __init__(self, queries):
            self.left = queries

        def query(self):
            calls.append("query")
            self.left -= 1
            return self.left < 0

        def synchronize(self):
            calls.append("synchronize")

    def wait(queries):
        calls.clear()
        mark = Mark(Device("gpu:0", torch.device("cpu")))
        mark._event = Event(queries)
        mark.wait()
        return calls

    monkeypatch.setattr("time.perf_counter", lambda: next(clock) * 1e-4)
    assert wait(2) == ["query"] * 3
    assert wait(9) == [*["query"] * 4, "synchronize"]
    Mark(Device("gpu:0", torch.device("cpu"))).wait()  # nothing is queued


def test_torch_is_held_to_a_plans_budget_beside_what_it_holds(monkeypatch):
    """A card of 1000 bytes, 100 of them taken before: 300 more may be taken, and all of them once the run has ended."""
    given = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: given.append(share))
    gpu, host = Device("gpu:0", torch.device("cpu")), Device("cpu", torch.device("cpu"))
    gpu.copies = object()  # as on CUDA
    for nbytes in (300, 5000, None):
        gpu.limit(nbytes)
        host.limit(nbytes)
    assert given == [0.4, 1.0, 1.0]


def test_a_spread_limits_each_gpu_to_what_the_context_and_the_driver_leave(tmp_path, monkeypatch):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    limits = []
    monkeypatch.setattr(Device, "limit", lambda self, nbytes: limits.append((self.name, nbytes)))
    plan = spread_plan(store.layout, ["gpu:0", "gpu:1"], {0})
    plan = replace(plan, devices=tuple(replace(gpu, budget=2**30, cuda=2**29) for gpu in plan.devices))
    spread = spread_for(plan, Rates(), "cpu")
    assert limits == [(name, 2**29 - 64 * 2**20) for name in ("gpu:0", "gpu:1")]
    spread.let_go()
    assert limits[2:] == [(name, None) for name in ("cpu", "gpu:0", "gpu:1")]


def test_experts_in_memory_are_computed_together_as_one_by_one(tmp_path):
    """Three precisions, of which the kernel takes two together; four tokens, the last of them without experts here."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    store = make_store(checkpoint, tmp_path / "store", "nf4,*.1=int8,*.2=half,*.3=nf4")
    spread = spread_for(spread_plan(store.layout, ["gpu:0"] * 2, {0}), Rates(), "cpu")
    slots = dict.fromkeys(store.layout.record_counts, 8)
    with closing(ExpertPool(store, slots, invariant=True, elsewhere=spread.residents)) as pool:
        pool.fill()
        experts = build_model(store, pool, "sdpa", spread).model.layers[0].mlp.experts
        x, results = torch.randn(4, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
        ids = torch.tensor([[1, 2], [3, 1], [0, 3], [0, 0]])
        AwayExperts(experts, expert_shapes(store.layout), Rates(), None).compute(Exchange(ids, x, results, {}), 4)
        alone = dict(pool.get(0, [1, 2, 3]))
        assert alone[3].takes_ours(2)
        for pair, expert in enumerate(ids.flatten().tolist()):
            row = x[pair // 2 : pair // 2 + 1]
            want = alone[expert](row, silu)[0] if expert else torch.zeros(64).bfloat16()
            assert torch.equal(results[pair], want)
