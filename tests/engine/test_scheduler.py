"""Which tokens go through the model next, by hand and by properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmix.engine.positions import KVAllocator
from qmix.engine.scheduler import Scheduler, Sequence


def test_the_first_stretch_that_is_long_enough_is_taken_and_neighbours_are_joined():
    stretches = KVAllocator(10)
    assert [stretches.take(size) for size in (4, 3, 3, 1)] == [0, 4, 7, None]
    stretches.give_back(0, 4)
    stretches.give_back(7, 3)
    assert stretches.take(5) is None
    stretches.give_back(4, 3)
    assert stretches.take(10) == 0


@given(st.data())
def test_stretches_never_overlap_and_all_come_back(data):
    capacity = data.draw(st.integers(1, 60))
    stretches, taken = KVAllocator(capacity), {}
    for size in data.draw(st.lists(st.integers(1, 20), max_size=60)):
        start = stretches.take(size)
        if start is None:
            for gone in data.draw(st.lists(st.sampled_from(sorted(taken)), unique=True)) if taken else []:
                stretches.give_back(gone, taken.pop(gone))
            continue
        taken[start] = size
        places = [place for first, count in taken.items() for place in range(first, first + count)]
        assert len(places) == len(set(places))
        assert 0 <= start <= capacity - size
    for start, size in taken.items():
        stretches.give_back(start, size)
    assert stretches.take(capacity) == 0


def drive(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[tuple[int, int]]]:
    """Every pass as numbers of sequences and tokens; each sequence ends at its limit."""
    passes = []
    while len(scheduler):
        chosen = scheduler.next_pass()
        passes.append([(sequences.index(sequence), count) for sequence, count in chosen])
        for sequence, count in chosen:
            sequence.done += count
            if sequence.done == len(sequence.tokens):
                sequence.tokens.append(7)
                if len(sequence.tokens) == sequence.limit:
                    scheduler.finish(sequence)
    return passes


def test_prompts_fill_what_running_sequences_leave_of_a_pass():
    """Passes of 4 tokens, two sequences at once: prompts of 3, 6 and 1 tokens with two new ones each."""
    sequences = [Sequence([1] * prompt, prompt + 2) for prompt in (3, 6, 1)]
    scheduler = Scheduler(capacity=20, batch=2, pass_tokens=4)
    for sequence in sequences:
        scheduler.add(sequence)
    assert drive(scheduler, sequences) == [
        [(0, 3), (1, 1)],
        [(0, 1), (1, 3)],
        [(1, 2), (2, 1)],
        [(1, 1), (2, 1)],
    ]


def test_a_sequence_waits_for_room_and_none_overtakes_it():
    sequences = [Sequence([1] * prompt, prompt + 1) for prompt in (5, 8, 1)]
    scheduler = Scheduler(capacity=10, batch=3, pass_tokens=16)
    for sequence in sequences:
        scheduler.add(sequence)
    assert drive(scheduler, sequences) == [[(0, 5)], [(1, 8), (2, 1)]]


@given(
    prompts=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=20),
    batch=st.integers(1, 6),
    spare=st.integers(0, 60),
)
def test_every_token_goes_through_once_and_a_running_sequence_is_in_every_pass(prompts, batch, spare):
    sequences = [Sequence([1] * prompt, prompt + new, shares=False) for prompt, new in prompts]
    scheduler = Scheduler(max(prompt + new for prompt, new in prompts) + spare, batch, pass_tokens=8)
    for sequence in sequences:
        scheduler.add(sequence)
    passes = drive(scheduler, sequences)
    for index, (prompt, new) in enumerate(prompts):
        counts = [dict(chosen).get(index, 0) for chosen in passes]
        assert sum(counts) == prompt + new - 1
        decoding = [count for before, count in zip(_running(counts), counts, strict=True) if before >= prompt]
        assert decoding[: new - 1] == [1] * (new - 1)
    assert all(sum(count for _, count in chosen) <= 8 and len(chosen) <= batch for chosen in passes)


def _running(counts: list[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]
