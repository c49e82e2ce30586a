"""Sequences of tokens as passes that compute shared prefixes once. Loads no torch.

Sorted sequences are the paths of a prefix tree in depth-first order: the longest prefix that a sequence shares with
any earlier one, it shares with the one directly before it. A pass takes neighbouring sequences, and of each only the
tokens after that shared prefix. So the choices of a question share its context, and questions a prompt's examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

TOKEN = ">u4"  # big-endian: byte strings sort like the sequences of numbers
TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True, order=True)
class Query:
    """A request for the probability of `targets`; each of the last len(targets) tokens of `inputs` predicts one.

    Both hold token ids as bytes of type TOKEN: a large evaluation keeps a hundred million of them in memory.
    """

    inputs: bytes
    targets: bytes

    @classmethod
    def of(cls, inputs: Sequence[int], targets: Sequence[int]) -> Query:
        assert 1 <= len(targets) <= len(inputs)
        return cls(np.array(inputs, TOKEN).tobytes(), np.array(targets, TOKEN).tobytes())

    @property
    def tokens(self) -> np.ndarray:
        return np.frombuffer(self.inputs, TOKEN)


@dataclass(frozen=True, slots=True)
class PathSegment:
    """`count` rows of a pass: a sequence's tokens from `position` on. The sequence before has those below `position`.

    A sequence that shares nothing begins at position 0. In a cache that many sequences share, `start` is the first of
    this one's places.
    """

    position: int
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """The queries [first, last) of a sorted list, and the number of rows in their pass."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens that go through the model together, and the predictions to look at.

    tokens    [N]: one row each, in `segments`
    rows      [P]: the row that predicts
    targets   [P]: the token that it predicts
    queries   [P]: the query, or sequence, of the prediction, counted from the pass's first
    """

    tokens: np.ndarray
    segments: tuple[PathSegment, ...]
    rows: np.ndarray
    targets: np.ndarray
    queries: np.ndarray


def spans(queries: Sequence[Query], limit: int) -> list[Span]:
    """Cut sorted queries into passes of at most `limit` rows; no single query may be longer."""
    found: list[Span] = []
    first = rows = 0
    for index, query in enumerate(queries):
        length = len(query.inputs) // TOKEN_BYTES
        assert length <= limit
        new = length - _common(queries[index - 1].tokens, query.tokens) if index > first else length
        if rows + new > limit:
            found.append(Span(first, index, rows))
            first, rows, new = index, 0, length
        rows += new
    return [*found, Span(first, len(queries), rows)] if queries else []


def make_pass(queries: Sequence[Query]) -> Pass:
    """Return the pass of sorted queries."""
    before, path = np.empty(0, TOKEN), np.empty(0, np.int64)  # the last sequence, and the row of each of its tokens
    tokens, segments, rows, targets = [], [], [], []
    count = 0
    for query in queries:
        ids, asked = query.tokens, np.frombuffer(query.targets, TOKEN)
        shared = _common(before, ids)
        if new := len(ids) - shared:
            tokens.append(ids[shared:])
            segments.append(PathSegment(shared, new))
        path = np.concatenate((path[:shared], np.arange(count, count + new)))
        count, before = count + new, ids
        rows.append(path[-len(asked) :])
        targets.append(asked)
    owners = np.repeat(np.arange(len(queries)), [len(asked) for asked in targets])
    flat = [np.concatenate(parts).astype(np.int64) for parts in (tokens, rows, targets)]
    return Pass(flat[0], tuple(segments), flat[1], flat[2], owners)


def plain_pass(sequences: Sequence[Sequence[int]]) -> Pass:
    """Return the pass of whole sequences, of which none shares a prefix; each token predicts the next one."""
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.fromiter(chain.from_iterable(sequences), np.int64, lengths.sum())
    rows = np.delete(np.arange(len(tokens)), lengths.cumsum() - 1)  # a sequence's last token predicts nothing
    segments = tuple(PathSegment(0, length) for length in lengths.tolist())
    return Pass(tokens, segments, rows, tokens[rows + 1], np.repeat(np.arange(len(sequences)), lengths - 1))


def continued_pass(tokens: Sequence[int], segments: Sequence[PathSegment]) -> Pass:
    """Return the pass of the next tokens of one or several sequences, those of `segments`; no token is predicted."""
    nothing = np.empty(0, np.int64)
    return Pass(np.array(tokens, np.int64), tuple(segments), nothing, nothing, nothing)


def chunks(segments: Sequence[PathSegment], limit: int | None) -> Iterator[tuple[slice, list[PathSegment]]]:
    """Cut the rows of a pass into chunks of `limit`; yield each with the segments, or parts of segments, in it.

    Without a limit each segment is a chunk, and must be a whole sequence.
    """
    start, count = 0, 0
    pieces: list[PathSegment] = []
    for segment in segments:
        assert limit or not segment.position
        position, left = segment.position, segment.count
        full = limit or left
        while left:
            taken = min(left, full - count)
            pieces.append(PathSegment(position, taken, segment.start))
            position, left, count = position + taken, left - taken, count + taken
            if count == full:
                yield slice(start, start + count), pieces
                start, count, pieces = start + count, 0, []
    if pieces:
        yield slice(start, start + count), pieces


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
