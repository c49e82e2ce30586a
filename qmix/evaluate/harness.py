"""A request engine as a model of lm-evaluation-harness. Texts are tokenised as the harness's own HFLM does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from qmix.engine.passes import Query
from qmix.engine.sampling import stream_seed
from qmix.errors import QmixError, UsageError, arg
from qmix.evaluate.prompt import Prompt
from qmix.text.prompt import longest_token
from qmix.text.tokenizer import encode, tokenizing

if TYPE_CHECKING:
    from qmix.engine.scoring import Score

MOST_NEW_TOKENS = 256  # if a task gives no limit: the harness's default
DRAWS = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}  # options with these names in Sampling
MARGIN = 64  # tokens kept beyond max_length: cutting the text may change the first ones
SEED = 1234  # of sampling, combined with a request's text and its repetition number
SCORED = ("loglikelihood", "loglikelihood_rolling")  # the harness's names of request types
CONTINUED = "generate_until"
Pair = tuple[Any, list[int], list[int]]  # the harness's key, context, continuation


class RequestEngine(Protocol):
    """Scores queries and continues prompts. `check` receives all of them before the first is computed."""

    def check(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> None: ...
    def score(self, queries: Sequence[Query]) -> list[Score]: ...
    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]: ...


class QmixLM(TemplateLM):
    """A harness model over an engine. Longer requests than `max_length` lose their beginning; `notify` reports it."""

    def __init__(
        self,
        engine: RequestEngine,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        notify: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.max_length, self.notify = engine, tokenizer, max_length, notify
        self._prefix: str = tokenizer.decode(self.prefix_token_id)
        self._most = (max_length + MARGIN) * longest_token(tokenizer)
        self._encode = lru_cache(maxsize=8)(self._tokenize)  # the choices of a question share a context
        self._cut = 0
        self.coming: Callable[[], Iterable[Instance]] | None = None  # all requests, until they were checked

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Return token ids. By default special tokens are added, unless the text begins with the prefix token."""
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _tokenize(self, string: str, add_special_tokens: bool | None) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return encode(self.tokenizer, string, **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability in nats, and whether greedy decoding would give it."""
        self._check_all()
        return self._loglikelihood_tokens(self._pairs(requests))

    def _check_all(self) -> None:
        """Let the engine check all requests before the first: a small budget is refused at once, for all of them."""
        if self.coming is None:
            return
        asked, self.coming = list(self.coming()), None
        by_kind = {kind: [each for each in asked if each.request_type == kind] for kind in (*SCORED, CONTINUED)}
        pairs = chain(self._pairs(by_kind[SCORED[0]]), self._windows(by_kind[SCORED[1]])[0])
        queries = [self._query(context, continuation) for _, context, continuation in pairs]
        drawn: Counter[str] = Counter()
        prompts = [self._prompt(each.args[0], each.args[1], drawn)[0] for each in by_kind[CONTINUED]]
        self._cut = 0
        self.engine.check(queries, prompts)

    def _pairs(self, requests: Iterable[Instance]) -> Iterator[Pair]:
        """Yield pairs one at a time: lists of a large task's ids would take gigabytes."""
        for request in requests:
            context, continuation = request.args
            if len(continuation) > self._most:
                raise self._too_long(f"more than {self._most} characters")
            if context := self._end(context):
                yield request.args, *self._encode_pair(context, continuation)
                continue
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                yield request.args, ids[:1], ids[1:]
            else:
                yield request.args, [self.prefix_token_id], ids

    def _loglikelihood_tokens(self, requests: Iterable[Pair], **kwargs: object) -> list[tuple[float, bool]]:
        queries = [self._query(context, continuation) for _, context, continuation in requests]
        self._tell_of_cuts(len(queries))
        return [(score.logprob, score.greedy) for score in self.engine.score(queries)]

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        if not context or not continuation:
            raise QmixError("a task has an empty continuation; correct its choices, or leave it out")
        if len(continuation) > self.max_length:
            raise self._too_long(f"{len(continuation)} tokens")
        whole = context + continuation
        self._cut += len(whole) > self.max_length + 1
        return Query.of(whole[-(self.max_length + 1) :][:-1], continuation)

    def _too_long(self, size: str) -> UsageError:
        return UsageError(
            f"a task's continuation has {size}, a context of {self.max_length} is too short for it; "
            f"give a larger {arg('context')}, or leave the task out"
        )

    def _end(self, text: str) -> str:
        """Return the end of a context that may be seen: tokenising the rest would waste memory."""
        return text[-self._most :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability in nats of each whole text, in windows of `max_length` without overlap."""
        self._check_all()
        pairs, ends = self._windows(requests)
        scores = [logprob for logprob, _ in self._loglikelihood_tokens(pairs)]
        return [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _windows(self, requests: Iterable[Instance]) -> tuple[list[Pair], list[int]]:
        """Return the windows of all texts in one list, and the end of each text's windows in it."""
        pairs: list[Pair] = []
        ends = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs += [(None, *make_disjoint_window(window)) for window in windows]
            ends.append(len(pairs))
        return pairs, ends

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the model's continuation of each context, up to the first stop sequence."""
        self._check_all()
        drawn: Counter[str] = Counter()
        asked = [self._prompt(request.args[0], request.args[1], drawn) for request in requests]
        self._tell_of_cuts(len(asked))
        answers = self.engine.generate([prompt for prompt, _ in asked])
        with tokenizing(self.tokenizer):
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        return [postprocess_generated_text(text, until, None) for text, (_, until) in zip(texts, asked, strict=True)]

    def _prompt(self, context: str, options: dict[str, Any], drawn: Counter[str]) -> tuple[Prompt, list[str]]:
        """Return the prompt of a request and its stop sequences; `drawn` counts repetitions of a context."""
        given = dict(normalize_gen_kwargs(options, MOST_NEW_TOKENS))
        until = handle_stop_sequences(given.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        most, samples = int(given.pop("max_gen_toks")), given.pop("do_sample", False)
        if unknown := sorted(given.keys() - DRAWS):
            raise UsageError(
                f"a task generates with {', '.join(unknown)}, which qmix does not support; leave the task out"
            )
        room = self.max_length - most
        if room < 1:
            raise UsageError(
                f"a task generates up to {most} tokens, a context of {self.max_length} leaves no room for its prompts; "
                f"give a larger {arg('context')}, or leave the task out"
            )
        ids = self.tok_encode(self._end(context))
        self._cut += len(ids) > room
        draws: tuple[tuple[str, float], ...] = ()
        if samples:
            seed = stream_seed(SEED, f"{drawn[context]}:{context}")
            drawn[context] += 1
            draws = (*sorted((name, value) for name, value in given.items() if value is not None), ("seed", seed))
        return Prompt(tuple(ids[-room:]), most, tuple(filter(None, until)), draws), until

    def _tell_of_cuts(self, requests: int) -> None:
        if self._cut:
            self.notify(
                f"{self._cut} of {requests} requests are longer than the context of {self.max_length} tokens: "
                "their beginnings are cut off"
            )
        self._cut = 0
