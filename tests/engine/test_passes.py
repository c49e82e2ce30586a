"""Shared prefixes, the cuts between passes and chunks, and the division of memory between tokens and experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.engine.passes import PathSegment, Query, chunks, make_pass, plain_pass, spans
from qmix.errors import DoesNotFitError, UsageError
from qmix.evaluate.card import CARD, CARD_AVERAGE, card_rows
from qmix.geometry import Geometry
from qmix.plan.memory import scoring_token_bytes
from qmix.plan.scoring import MOST_TOKENS, plan_scoring
from qmix.plan.slots import least_slots
from qmix.store.layout import StoreLayout, parse_precisions

BIG = Geometry(6144, 16384, 56, 48, 8, 128, 8, 2, 32000, 65536)
GIB = 2**30
QUERIES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=6).flatmap(
        lambda ids: st.integers(1, len(ids)).map(lambda count: (ids, list(range(10, 10 + count))))
    ),
    min_size=1,
    max_size=12,
)


def queries(*pairs) -> list[Query]:
    return sorted({Query.of(*pair) for pair in pairs})


def test_a_context_and_equal_inputs_are_computed_once():
    """Two questions begin alike; the first has two one-token choices, the second two longer ones."""
    asked = queries(([1, 2, 3], [7]), ([1, 2, 3], [8]), ([1, 2, 4, 5], [5, 6]), ([1, 2, 4, 9], [9, 6]))
    found = make_pass(asked)
    assert found.tokens.tolist() == [1, 2, 3, 4, 5, 9]
    assert found.segments == (PathSegment(0, 3), PathSegment(2, 2), PathSegment(3, 1))
    assert found.rows.tolist() == [2, 2, 3, 4, 3, 5]
    assert found.targets.tolist() == [7, 8, 5, 6, 9, 6]
    assert found.queries.tolist() == [0, 1, 2, 2, 3, 3]
    assert [(span.first, span.last, span.rows) for span in spans(asked, 6)] == [(0, 4, 6)]
    assert [(span.first, span.last, span.rows) for span in spans(asked, 5)] == [(0, 3, 5), (3, 4, 4)]


@given(QUERIES, st.integers(6, 20))
def test_every_query_sees_its_own_tokens_and_each_beginning_is_one_row(pairs, limit):
    asked = queries(*pairs)
    cut = spans(asked, limit)
    assert [index for span in cut for index in range(span.first, span.last)] == list(range(len(asked)))
    for span in cut:
        mine = asked[span.first : span.last]
        found = make_pass(mine)
        assert len(found.tokens) == span.rows <= limit
        beginnings = {tuple(query.tokens[:end].tolist()) for query in mine for end in range(1, len(query.tokens) + 1)}
        assert span.rows == len(beginnings)
        paths = _paths(found)
        for number, query in enumerate(mine):
            targets = found.targets[found.queries == number]
            assert targets.astype(">u4").tobytes() == query.targets
            rows = found.rows[found.queries == number]
            assert paths[rows[-1]] == query.tokens.tolist()
            assert [paths[row] for row in rows] == [paths[rows[-1]][: len(paths[row])] for row in rows]
            assert [len(paths[row]) for row in rows] == list(
                range(len(query.tokens) - len(rows) + 1, len(query.tokens) + 1)
            )


def _paths(found) -> list[list[int]]:
    """Return the tokens that each row sees, itself included: a segment continues the path of the one before."""
    paths: list[list[int]] = []
    path: list[int] = []
    tokens = iter(found.tokens.tolist())
    for segment in found.segments:
        path = path[: segment.position]
        for _ in range(segment.count):
            path = [*path, next(tokens)]
            paths.append(path)
    return paths


def test_whole_sequences_predict_all_their_tokens_but_the_first():
    found = plain_pass([[5, 6, 7], [5], [5, 8]])
    assert found.tokens.tolist() == [5, 6, 7, 5, 5, 8]
    assert found.segments == (PathSegment(0, 3), PathSegment(0, 1), PathSegment(0, 2))
    assert found.rows.tolist() == [0, 1, 4]
    assert found.targets.tolist() == [6, 7, 8]
    assert found.queries.tolist() == [0, 0, 2]


def test_chunks_cut_segments_and_know_each_part_s_position():
    segments = [PathSegment(0, 5), PathSegment(3, 1), PathSegment(2, 3)]
    assert list(chunks(segments, 4)) == [
        (slice(0, 4), [PathSegment(0, 4)]),
        (slice(4, 8), [PathSegment(4, 1), PathSegment(3, 1), PathSegment(2, 2)]),
        (slice(8, 9), [PathSegment(4, 1)]),
    ]
    shared = [PathSegment(7, 3, start=20), PathSegment(0, 2, start=5)]
    assert [part for _, parts in chunks(shared, 2) for part in parts] == [
        PathSegment(7, 2, 20),
        PathSegment(9, 1, 20),
        PathSegment(0, 1, 5),
        PathSegment(1, 1, 5),
    ]
    whole = [PathSegment(0, 5), PathSegment(0, 1)]
    assert list(chunks(whole, None)) == [(slice(0, 5), whole[:1]), (slice(5, 6), whole[1:])]
    with pytest.raises(AssertionError):  # a chunk of its own cannot see another's prefix
        list(chunks(segments, None))


def test_tokens_sort_as_numbers():
    assert queries(([256], [1]), ([2], [1]))[0].tokens.tolist() == [2]
    assert Query.of([70000], [1]).tokens.tolist() == [70000]


@pytest.fixture
def layout(monkeypatch) -> StoreLayout:
    monkeypatch.setattr("qmix.plan.scoring.interpreter_memory", lambda kernels: 500 * 2**20)
    return StoreLayout(BIG, parse_precisions("nf4", BIG), "bf16")


def test_where_not_all_experts_fit_tokens_come_before_slots(layout):
    plan = plan_scoring(layout, 2000, 10**7, 13 * GIB)
    assert sum(plan.slots.values()) == 8
    assert 2000 < plan.tokens < MOST_TOKENS
    more = plan_scoring(layout, 2000, 10**7, 24 * GIB)
    assert more.tokens == MOST_TOKENS
    assert 8 < sum(more.slots.values()) < BIG.num_records


def test_the_smallest_budgets_have_the_fewest_slots_and_what_is_left_is_for_tokens(layout):
    plan = plan_scoring(layout, 100, 10**7, 12 * GIB)
    assert plan.slots == least_slots(layout)
    (slot,) = plan.slots
    assert 100 < plan.tokens < 2048 + (8 - 2) * slot // scoring_token_bytes(BIG)


def test_where_all_experts_fit_they_stay(layout):
    plan = plan_scoring(layout, 2000, 10**7, 96 * GIB)
    assert (sum(plan.slots.values()), plan.tokens) == (BIG.num_records, MOST_TOKENS)


def test_a_small_job_takes_no_more_than_it_needs(layout):
    few = plan_scoring(layout, 100, 300, 24 * GIB)
    assert few.tokens == 300
    assert sum(few.slots.values()) > sum(plan_scoring(layout, 100, 10**6, 24 * GIB).slots.values())
    assert plan_scoring(layout, 100, 10**6, 24 * GIB, batch_tokens=700).tokens == 700


@given(
    st.sampled_from(["nf4", "nf4,0.*=int8,*.3=half"]),
    st.integers(12, 120),
    st.integers(1, 60000),
    st.integers(1, 10**6),
)
def test_no_plan_exceeds_its_budget_and_the_smallest_does(precision, gib, longest, rows):
    layout = StoreLayout(BIG, parse_precisions(precision, BIG), "bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qmix.plan.scoring.interpreter_memory", lambda kernels: 500 * 2**20)
        with pytest.raises(DoesNotFitError) as refused:
            plan_scoring(layout, longest, max(rows, longest), 10 * GIB)
        smallest = refused.value.smallest
        assert f"ram='{-(-smallest // 10**6)}MB'" in str(refused.value)
        assert plan_scoring(layout, longest, max(rows, longest), smallest).slots == least_slots(layout)
        plan = plan_scoring(layout, longest, max(rows, longest), max(smallest, gib * GIB))
        assert plan.total < plan.ram
        assert longest <= plan.tokens <= max(longest, MOST_TOKENS)
        assert all(2 <= plan.slots[nbytes] <= count for nbytes, count in layout.record_counts.items())


def test_a_token_takes_what_its_states_take():
    # stream, normed stream, two experts' results, their sum and its copy, each 6144 numbers of two bytes
    assert scoring_token_bytes(BIG) - 6 * 6144 * 2 == 128


def test_a_request_longer_than_the_asked_batch_is_refused(layout):
    with pytest.raises(UsageError, match="batch_tokens 50: must be at least 60, the tokens of the longest request"):
        plan_scoring(layout, 60, 100, 24 * GIB, batch_tokens=50)


def test_the_card_beside_results_by_hand():
    values = {known.task: {known.metric: 0.5, known.metric.replace(",", "_stderr,"): 0.03} for known in CARD}
    values["mmlu"]["acc,none"] = 0.8
    *rows, average = card_rows(values)
    assert [row.title for row in rows][:3] == ["ARC-Challenge", "HellaSwag", "MMLU"]
    assert rows[0].difference == pytest.approx(50 - 70.48)
    assert rows[2].difference == pytest.approx(80 - 77.81)
    assert rows[0].error == pytest.approx(3)
    assert average.figure == pytest.approx((5 * 50 + 80) / 6)
    assert average.error == pytest.approx(3 * np.sqrt(6) / 6)
    assert average.card == CARD_AVERAGE == pytest.approx(np.mean([known.figure for known in CARD]), abs=0.005)
    values["gsm8k"]["exact_match_stderr,strict-match"] = "N/A"  # of a single question
    assert np.isnan(card_rows(values)[-1].error)
