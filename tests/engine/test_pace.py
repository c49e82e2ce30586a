"""Tokens of a pass, computed by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmix.engine.pace import Pace
from qmix.plan.memory import PREFILL_CHUNK


def test_a_pass_grows_until_it_computes_as_long_as_it_reads():
    """512 tokens in 10 s, of which 8 are waited: 2 s of computing beside 9 s of reads take four and a half chunks."""
    pace = Pace(8192)
    assert pace.tokens([1, 3000]) == 512
    pace.note(512, seconds=10, waited=8, reading=9)
    assert pace.tokens([1, 3000]) == 2048
    pace.note(2048, seconds=10, waited=2, reading=9)  # 8 s of computing
    assert pace.tokens([1, 3000]) == 2048
    pace.note(2048, seconds=40, waited=0, reading=9)  # the cores have become slow
    assert pace.tokens([1, 3000]) == 512


def test_a_prompt_goes_as_a_whole_where_nobody_is_being_continued():
    pace = Pace(4096)
    assert pace.tokens([700, 300]) == 1024
    assert pace.tokens([700, 300, 1]) == 512
    assert pace.tokens([9000]) == 4096
    assert pace.tokens([1]) == 512


def test_short_passes_say_nothing_and_memory_is_the_limit():
    pace = Pace(1024)
    pace.note(16, seconds=10, waited=9.9, reading=10)
    assert pace.tokens([1]) == 512
    pace.note(512, seconds=10, waited=10, reading=10)
    assert pace.tokens([1]) == 1024
    assert Pace().tokens([5000]) == 512


@given(
    most=st.integers(1, 16),
    notes=st.lists(st.tuples(st.integers(0, 9000), *[st.floats(0, 1e4, allow_subnormal=False)] * 3)),
    left=st.lists(st.integers(1, 9000)),
)
def test_a_pass_has_whole_chunks_and_memory_for_them(most, notes, left):
    pace = Pace(most * PREFILL_CHUNK)
    for tokens, seconds, waited, reading in notes:
        pace.note(tokens, max(seconds, 1e-6), min(waited, seconds), min(reading, seconds))
    tokens = pace.tokens(left)
    assert tokens % PREFILL_CHUNK == 0
    assert PREFILL_CHUNK <= tokens <= most * PREFILL_CHUNK
