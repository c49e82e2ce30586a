"""The cost of quantising an expert: the estimate against the full computation, and the mixes that it leads to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from calibration.sensitivity import KINDS, Kind, SensitivityMeter
from qmix.engine.layerwise import RouterOutput
from qmix.geometry import Geometry
from qmix.precision.round_trip import round_trip

SMALL = Geometry(64, 128, 2, 4, 2, 16, 3, 2, 8, 16)
RNG = torch.Generator().manual_seed(0)
TOKENS = 50


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


STATES, STREAM = random(TOKENS, 64), 3 * random(TOKENS, 64)
LOGITS = random(TOKENS, 3)
WEIGHTS, CHOSEN = LOGITS.softmax(-1).topk(2)
MATRICES = [{"w1": random(128, 64), "w3": random(128, 64), "w2": random(64, 128)} for _ in range(3)]


def measured(kinds=KINDS, samples: int = TOKENS, states=STATES, stream=STREAM, weights=WEIGHTS, chosen=CHOSEN):
    meter = SensitivityMeter(SMALL, F.silu, kinds, samples)
    meter.routed(0, stream, states, RouterOutput(LOGITS, weights, chosen))
    for index in range(3):
        if (chosen == index).any():
            meter.expert(0, index, MATRICES[index])
    return meter


def output(matrices, x):
    return F.linear(F.silu(F.linear(x, matrices["w1"])) * F.linear(x, matrices["w3"]), matrices["w2"])


@pytest.mark.parametrize("kind", [Kind("nf4"), Kind("fp4"), Kind("int8"), Kind("nf4", 32)], ids=lambda kind: kind.name)
def test_every_token_sampled_is_the_sum_itself(kind):
    found = measured([kind])
    for index in range(3):
        held = {name: round_trip(matrix, kind.precision, kind.block) for name, matrix in MATRICES[index].items()}
        expected = 0.0
        for token in range(TOKENS):
            for place in range(2):
                if CHOSEN[token, place] == index:
                    moved = output(held, STATES[token]) - output(MATRICES[index], STATES[token])
                    scale = WEIGHTS[token, place] ** 2 / STREAM[token].square().sum()
                    expected += (scale * moved.square().sum()).item()
        assert found.errors[kind.name][0][index] == pytest.approx(expected, rel=1e-3)
    assert sum(found.sampled[0]) == 2 * TOKENS


def test_fewer_samples_stand_for_all():
    """Any sample of identical tokens gives the full cost."""
    alike = {
        "states": STATES[:1].expand(TOKENS, -1),
        "stream": STREAM[:1].expand(TOKENS, -1),
        "weights": WEIGHTS[:1].expand(TOKENS, -1),
        "chosen": CHOSEN[:1].expand(TOKENS, -1),
    }
    whole, some = measured(**alike), measured(samples=7, **alike)
    assert sorted(some.sampled[0]) == [0, 7, 7]
    for kind in KINDS:
        assert some.errors[kind.name][0] == pytest.approx(whole.errors[kind.name][0], rel=1e-5)
    unused = some.sampled[0].index(0)
    assert all(table[0][unused] == 0 for table in some.errors.values())


def test_finer_is_nearer():
    errors = {name: sum(table[0]) for name, table in measured().errors.items()}
    assert errors["int8"] < errors["nf4/32"] < errors["nf4"] < errors["nf4/128"] < errors["nf4/256"]
    assert errors["nf4"] < errors["fp4"]


def test_twice_the_weight_counts_four_times_and_a_larger_stream_less():
    once = measured([Kind("nf4")]).errors["nf4"][0]
    assert measured([Kind("nf4")], weights=2 * WEIGHTS).errors["nf4"][0] == pytest.approx([4 * e for e in once])
    assert measured([Kind("nf4")], stream=2 * STREAM).errors["nf4"][0] == pytest.approx([e / 4 for e in once])


def test_names_and_bytes():
    assert [kind.name for kind in KINDS] == ["nf4", "fp4", "int8", "nf4/32", "nf4/128", "nf4/256"]
    assert [kind.nbytes(4096) for kind in KINDS] == [2176, 2176, 4096, 2304, 2112, 2080]
