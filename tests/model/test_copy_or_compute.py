"""The choice between copying to the GPU and computing on the CPU, by hand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qmix.machine.rates import Rates
from qmix.model.gpu.copy_or_compute import ExpertSize, copied_share, copy_seconds, copying_pays, host_seconds

MIXTRAL = ExpertSize(record=160_000_000, weights=302_000_000, four_bit=True)
RATES = Rates(memory_read=40e9, four_bit_read=32e9, matmul=1e12, pcie=16e9, gpu_memory=850e9, gpu_matmul=60.4e12)


def test_one_token_by_hand():
    # CPU: 160 MB at 32 GB/s is 5 ms each; two rows of 1000 halves down and up at 16 GB/s are half a microsecond
    assert host_seconds(MIXTRAL, [1, 1], 1000, RATES) == 0.010 + 2 * 2 * 1000 * 2 / 16e9
    # GPU: 10 ms a copy; the last one's products, 320 MB of traffic, come on top
    assert copy_seconds(MIXTRAL, [1, 1], RATES) == 0.020 + 2 * 160e6 / 850e9
    assert not copying_pays(MIXTRAL, [1, 1], 1000, RATES)


def test_many_tokens_by_hand():
    # 200 tokens at 604 MFLOP each: 0.12 s on the CPU, 2 ms on the GPU, hidden behind the next copy
    assert host_seconds(MIXTRAL, [200], 0, RATES) == 0.1208
    assert copy_seconds(MIXTRAL, [200], RATES) == 0.010 + 0.002
    assert copying_pays(MIXTRAL, [200], 6144, RATES)


def test_eight_bits_are_read_at_the_speed_of_memory():
    wide = ExpertSize(record=320_000_000, weights=302_000_000, four_bit=False)
    assert host_seconds(wide, [1], 0, RATES) == 0.008


@given(st.lists(st.integers(1, 512), min_size=1, max_size=8), st.floats(1e9, 1e11))
def test_a_faster_link_never_speaks_against_copying(tokens, pcie):
    slower, faster = Rates(pcie=pcie), Rates(pcie=2 * pcie)
    if copying_pays(MIXTRAL, tokens, 6144, slower):
        assert copy_seconds(MIXTRAL, tokens, faster) <= copy_seconds(MIXTRAL, tokens, slower)
        assert copying_pays(MIXTRAL, tokens, 0, faster)


def test_the_share_that_is_copied_by_hand():
    """CPU 10 a record, link 5, memory 20 a second: two experts side by side, as copying is half as fast."""
    size = ExpertSize(record=10, weights=10, four_bit=True)
    rates = Rates(four_bit_read=10.0, pcie=5.0, memory_read=20.0, matmul=1e9)
    assert copied_share(size, [1], rates, 2) == 0  # 1 s on the CPU, 2 s by the link
    assert copied_share(size, [1, 1], rates, 2) == 0  # 2 s either way
    assert copied_share(size, [1, 1, 1], rates, 2) == 1  # 2 s instead of 3
    assert copied_share(size, [1, 1, 1], replace(rates, memory_read=8.0), 2) == 0  # memory allows no more than 3.75 s
    assert copied_share(size, [1, 1], replace(rates, pcie=30.0), 2) == 1  # 1 s; both copied: 0.67 s, memory 1 s
    many = replace(rates, matmul=10.0)  # a token takes 2 s of arithmetic on the CPU
    assert copied_share(size, [4, 1], many, 2) == 1
