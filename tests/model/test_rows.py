"""Passes of a few tokens of many sequences: how many calls they take, and who gets the modules one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from stores import make_store, many_prompts
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralTopKRouter

from qmix.engine.batch import BatchRunner
from qmix.errors import Cancelled
from qmix.kernels.cpu import team
from qmix.model.decoder_layer import RowsLayer
from qmix.model.invariant import InvariantNorm, InvariantRouter
from qmix.model.kv import Chunk
from qmix.plan.memory import SHORT_PASS, is_short
from qmix.precision import formats, matmul


@pytest.fixture(autouse=True)
def kernels_for_any_size(monkeypatch):
    """Let small models use the kernels of large ones."""
    for module in (formats, matmul):
        monkeypatch.setattr(module, "KERNEL_WEIGHTS", 0)


@pytest.fixture
def runner_of(tiny, tmp_path) -> Callable[..., BatchRunner]:
    """Open a model with this number of layers and every expert in memory."""

    def runner_of(layers: int = 2) -> BatchRunner:
        config, directory = TINY_CONFIG | {"num_hidden_layers": layers}, tmp_path / str(layers)
        checkpoint = write_checkpoint(directory / "checkpoint", random_weights(config), config, tokenizer=tiny)
        runner = many_prompts(make_store(checkpoint, directory / "store"), 16, SHORT_PASS + 1)
        runner.pool.fill()
        return runner

    return runner_of


def continued(sequences: int) -> list[Chunk]:
    """Return chunks with the second token of each sequence."""
    return [Chunk([3 + index % 90], 1, 16 * index, True) for index in range(sequences)]


def begun(sequences: int) -> list[Chunk]:
    """Return chunks with the first token of each sequence."""
    return [Chunk([5 + index % 80], 0, 16 * index, False) for index in range(sequences)]


@pytest.mark.parametrize("tokens", [1, 5, SHORT_PASS])
@pytest.mark.parametrize(("resident", "a_layer", "around"), [(True, 0, 3), (False, 2, 2)], ids=["in memory", "disk"])
def test_a_pass_is_one_call_or_two_a_layer(runner_of, monkeypatch, tokens, resident, a_layer, around):
    """The norm and the head are a call each; 'around' counts them."""
    calls, run = [], team.run
    monkeypatch.setattr(team, "run", lambda *arguments: (calls.append(1), run(*arguments)))
    counts = []
    for layers in (2, 4):
        with runner_of(layers) as runner:
            assert all(type(layer) is RowsLayer for layer in runner.model.model.layers)
            if not resident:
                runner.model.steps = None
            runner.forward(begun(tokens))
            calls.clear()
            runner.forward(continued(tokens))
            counts.append(len(calls))
    assert counts == [2 * a_layer + around, 4 * a_layer + around]


def test_a_longer_pass_goes_by_modules(runner_of):
    with runner_of() as runner:
        seen = []
        runner.model.model.layers[0].self_attn.forward, forward = (
            lambda *given, **options: (seen.append(1), forward(*given, **options))[1],
            runner.model.model.layers[0].self_attn.forward,
        )
        runner.model.steps = None
        for tokens in (SHORT_PASS, SHORT_PASS + 1):
            runner.forward(begun(tokens))
        assert seen == [1]


def test_only_short_sequences_are_short_passes():
    """The work space holds the sums of a chunk's rows, each over a block of 512 positions."""
    assert is_short(32, 8192)
    assert not is_short(32, 8193)
    assert is_short(1, 2**18)
    assert not is_short(SHORT_PASS + 1, 1)


@pytest.mark.parametrize("tokens", [5, SHORT_PASS])
def test_a_hook_gets_the_modules_one_by_one_with_the_same_numbers(runner_of, tokens):
    with runner_of() as runner:
        runner.forward(begun(tokens))
        expected, seen = runner.forward(continued(tokens)), []
        runner.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(runner.forward(continued(tokens)), expected)
        assert len(seen) == 1


def test_the_pool_counts_each_expert_of_a_pass_once(runner_of):
    with runner_of() as runner:
        runner.forward(begun(9))
        counts = []
        for steps in (runner.model.steps, None):
            runner.model.steps = steps
            before = runner.pool.counters.copy()
            asked = [list(row) for row in runner.pool.by_expert.asked]
            runner.forward(continued(9))
            counts.append((runner.pool.counters.since(before), [*runner.pool.by_expert.asked]))
            counts[-1] = (
                counts[-1][0],
                [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(asked, counts[-1][1], strict=True)],
            )
        assert counts[0] == counts[1]
        assert sum(map(sum, counts[0][1])) <= 2 * 4  # layers and their experts


def test_a_stopped_runner_takes_no_pass(runner_of):
    with runner_of() as runner:
        runner.forward(begun(3))
        runner.pool.cancelled = True
        with pytest.raises(Cancelled):
            runner.forward(continued(3))


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_norms_and_choices_are_transformers(runner_of, tokens):
    """Norms agree within one bit of bf16; choices agree except for the order of equal logits."""
    with runner_of() as runner:
        config, layer = runner.model.config, runner.model.model.layers[0]
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    norm, router = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps), MixtralTopKRouter(config)
    norm.weight = nn.Parameter(torch.linspace(0.5, 2, config.hidden_size).bfloat16())
    router.weight = layer.mlp.gate.weight
    torch.testing.assert_close(InvariantNorm(norm)(x[None]), norm(x[None]), rtol=2**-7, atol=0)
    logits, shares, chosen = InvariantRouter(router.weight, config.num_experts_per_tok, kernels=True)(x)
    expected_shares, expected = logits.float().softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    assert torch.equal(logits.gather(1, chosen), logits.gather(1, expected))  # equal logits may change places
    torch.testing.assert_close(shares, expected_shares / expected_shares.sum(-1, keepdim=True))


def test_any_number_of_threads_gives_the_same_numbers(runner_of, monkeypatch):
    with runner_of() as runner:
        runner.forward(begun(7))
        expected = runner.forward(continued(7))
        for threads in (1, 5):
            monkeypatch.setattr(team, "threads", lambda threads=threads: threads)
            assert torch.equal(runner.forward(continued(7)), expected)
