"""Constrain an answer token by token: a mask says which tokens can continue the text under its grammar.

A model's tokenizer is prepared once, a matcher for each answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qmix.errors import UsageError
from qmix.text.grammar import GRAMMAR, SCHEMA, library

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Constraint:
    """An answer's grammar: the tokens that may come next. Its memory grows with the answer."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._mask = np.zeros((1, -(-vocabulary // 32)), dtype=np.int32)
        self._ids: list[int] = []

    def allowed(self, ids: Sequence[int]) -> np.ndarray | None:
        """Return which tokens [V] may follow the answer's `ids`; None where these do not follow the grammar."""
        if not self._go_to(ids):
            return None
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        return bits.view(np.bool_)

    def complete(self, ids: Sequence[int]) -> bool:
        """Return whether nothing but an end token may follow `ids`."""
        return self._go_to(ids) and bool(self._matcher.is_stopped())

    @property
    def failed(self) -> bool:
        """Return whether the grammar became too complex to go on; the answer is then cut here."""
        return bool(self._matcher.is_error())

    def _go_to(self, ids: Sequence[int]) -> bool:
        """Bring the matcher behind `ids`: drafts that were not accepted are taken back."""
        known = len(self._ids)
        if list(ids[:known]) != self._ids:
            same = next(
                (at for at, pair in enumerate(zip(self._ids, ids, strict=False)) if pair[0] != pair[1]), len(ids)
            )
            self._matcher.rollback(known - same)
            del self._ids[same:]
        new = list(ids[len(self._ids) :])
        taken = self._matcher.try_consume_tokens(new) if new else 0
        self._ids += new[:taken]
        return taken == len(new)


class GrammarCompiler:
    """Makes constraints for a model with `vocabulary` logits, whose answers end with one of the tokens `ends`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int]) -> None:
        llguidance = library(SCHEMA)
        if not ends:
            raise UsageError(f"{SCHEMA}: the model's generation config has no eos_token_id to end an answer")
        from llguidance.hf import from_tokenizer

        self._matcher, self.vocabulary = llguidance.LLMatcher, vocabulary
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends))
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def constraint(self, source: str) -> Constraint:
        """Return the constraint of one answer. Raises UsageError where the model's tokens cannot follow the grammar."""
        matcher = self._matcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UsageError(f"{GRAMMAR}: {str(matcher.get_error()).splitlines()[0][:300]}")
        return Constraint(matcher, self.vocabulary)
