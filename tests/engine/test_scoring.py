"""Scores equal transformers' log-probabilities, and do not depend on the rest of the pass or on the pool's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from stores import make_store

from calibration.corpus import alternating, bundled
from qmix.engine.passes import TOKEN, Query, make_pass, spans
from qmix.engine.scoring import Score, Scorer
from qmix.plan.scoring import ScoringPlan
from qmix.text.tokenizer import load_tokenizer

RNG = torch.Generator().manual_seed(0)


def ids(count: int, vocabulary: int = 4000) -> list[int]:
    return torch.randint(3, vocabulary, (count,), generator=RNG).tolist()


def question(context: list[int], *lengths: int, vocabulary: int = 4000) -> list[Query]:
    """Return a context with a continuation of each length."""
    return [Query.of((context + more)[:-1], more) for length in lengths for more in (ids(length, vocabulary),)]


def score(store, queries: list[Query], tokens: int = 4096, slots: int | None = None) -> list[Score]:
    longest = max(len(query.inputs) for query in queries) // 4
    plan = ScoringPlan(0, tokens, longest, dict.fromkeys(store.layout.record_counts, slots or 48), 0)
    with Scorer(store, plan) as scorer:
        return [
            found
            for span in spans(queries, tokens)
            for found in scorer.score(make_pass(queries[span.first : span.last]))
        ]


def reference(model, query: Query) -> tuple[float, bool]:
    targets = torch.from_numpy(np.frombuffer(query.targets, TOKEN).astype(np.int64))
    with torch.inference_mode():
        logits = model(torch.from_numpy(query.tokens.astype(np.int64))[None]).logits[0, -len(targets) :].float()
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])
    return logprobs.double().sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: transformers' many small operations wait for threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def asked() -> list[Query]:
    """Return queries with contexts that are prefixes of others, one longer than a chunk; one or more tokens a choice."""
    base = ids(700)
    found = [query for length in (1, 5, 40, 600, 700) for query in question(base[:length], 1, 1, 3, 9)]
    return sorted({*found, *question(ids(30), 2, 20)})


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("half") / "store", "half")


def test_half_is_as_close_to_fp32_as_transformers_bf16(half, tiny):
    """Token by token on texts in four languages. A router's near tie depends on the rounding and moves single tokens by
    up to 3 nats, in both implementations. So the test compares means of absolute errors."""
    tokenizer = load_tokenizer(tiny)
    texts = [tokenizer(document.text)["input_ids"][:300] for document in alternating(bundled())[:4]]
    ours, theirs, exact = [], [], []
    models = [reference_model(tiny, dtype) for dtype in (torch.bfloat16, torch.float32)]
    for text in texts:
        ours += [
            found.logprob for found in score(half, [Query.of(text[:end], [text[end]]) for end in range(1, len(text))])
        ]
        for model, found in zip(models, (theirs, exact), strict=True):
            with torch.inference_mode():
                logprobs = model(torch.tensor([text[:-1]])).logits[0].float().log_softmax(-1)
            found.extend(logprobs.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist())
    ours, theirs, exact = map(np.array, (ours, theirs, exact))
    assert np.abs(ours - exact).mean() <= 1.2 * np.abs(theirs - exact).mean()
    assert np.abs(ours - theirs).mean() < 0.05
    assert np.median(np.abs(ours - theirs)) < 0.02
    assert ours.sum() == pytest.approx(theirs.sum(), rel=2e-3)


@pytest.mark.parametrize("precision", ["nf4", "int8", "half"])
def test_a_score_depends_on_its_query_alone(tiny, tmp_path, asked, precision):
    """The pass, its size and the number of slots do not change a bit."""
    store = make_store(tiny, tmp_path / "store", precision)
    whole = score(store, asked)
    assert whole == score(store, asked, tokens=750, slots=3)
    assert [score(store, [query])[0] for query in asked[:3]] == whole[:3]


def test_what_is_greedy_is_said_to_be(half):
    context = ids(20)
    model_says = []
    for _ in range(3):
        candidates = [Query.of(context + model_says, [token]) for token in range(4096)]
        found = score(half, sorted(candidates))
        best = max(range(4096), key=lambda place: found[place].logprob)
        assert [place for place in range(4096) if found[place].greedy] == [best]
        assert sum(np.exp(result.logprob) for result in found) == pytest.approx(1, abs=1e-4)
        model_says.append(best)
    (greedy,) = score(half, [Query.of((context + model_says)[:-1], model_says)])
    (other,) = score(half, [Query.of((context + model_says)[:-1], [*model_says[:-1], (model_says[-1] + 1) % 4096])])
    assert (greedy.greedy, other.greedy) == (True, False)


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 7}, {"tie_word_embeddings": True}, {"head_dim": 12}], ids=["window", "tied", "odd"]
)
def test_other_models(tmp_path, changes):
    directory = make_checkpoint(tmp_path / "model", **changes)
    store = make_store(directory, tmp_path / "store", "half")
    base = ids(30, 60)
    asked = sorted([*question(base, 1, 4, vocabulary=60), *question(base[:20], 3, 8, vocabulary=60)])
    model = reference_model(directory)
    for found, query in zip(score(store, asked), asked, strict=True):
        assert found.logprob == pytest.approx(reference(model, query)[0], rel=0.03)
