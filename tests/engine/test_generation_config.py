"""Every field of a generation_config.json: what it does is transformers' doing, and the same wherever text is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stores import make_store
from transformers import GenerationConfig, MixtralForCausalLM

from qmix.chat.session import Session
from qmix.engine.batch import BatchRunner
from qmix.engine.generation_config import IGNORED, REFUSED, Honoured, parse_generation_config
from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Sampler
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.errors import StoreError
from qmix.plan import make_plan

FILE = Path("model/generation_config.json")
VOCABULARY = 4096
PROMPT = "Click the button to"
HONOURED = set(Honoured.__struct_fields__)


def parsed(content, vocab_size: int = VOCABULARY) -> GenerationConfig:
    return parse_generation_config(json.dumps(content).encode(), vocab_size, FILE)


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("config") / "store", "half")


@pytest.fixture(scope="module")
def runner(store):
    with Runner(store, make_plan(store.layout, 2**40, 256, 2**28)) as runner:
        yield runner


@pytest.fixture(scope="module")
def batch(store):
    with BatchRunner(store, make_plan(store.layout, 2**40, 256, 2**28, batch=2)) as runner:
        yield runner


@pytest.fixture(scope="module")
def theirs(tiny):
    model = MixtralForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    model.generation_config = GenerationConfig()
    return model


def test_every_field_of_transformers_is_decided_once():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields == HONOURED | REFUSED.keys() | IGNORED
    assert len(fields) == len(HONOURED) + len(REFUSED) + len(IGNORED)


GREEDY = {  # a value of each field that changes what the embedded model continues the prompt with
    "repetition_penalty": 2,
    "encoder_repetition_penalty": 3.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 12,
    "min_new_tokens": 7,
    "bad_words_ids": [[1], [261]],
    "sequence_bias": [[[261], -50], [[300], 2.0]],
    "suppress_tokens": [261],
    "begin_suppress_tokens": [261],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": [2],
    "eos_token_id": [2, 261],
    "stop_strings": "dialog",
    "remove_invalid_values": True,
    "renormalize_logits": True,
}
TOKENS = {"forced_eos_token_id": 3}  # of the continuation, 8 for the others: it ends by itself with the fifth
WITHOUT_CHANGE = {"remove_invalid_values", "renormalize_logits", "forced_bos_token_id"}  # of a greedy text from ids
SAMPLED = {
    "do_sample": True,
    "temperature": 2,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.2,
    "top_h": 0.4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.1,
}


def with_ids(content, runner):
    """Put the token that a greedy text begins with in the place of 261, its second in that of 300."""
    first, second = runner.complete(PROMPT, max_new_tokens=2, temperature=0).token_ids
    text = json.dumps(content).replace("261", str(first)).replace("300", str(second))
    return json.loads(text)


def test_the_examples_are_of_all_honoured_fields():
    assert GREEDY.keys() | SAMPLED.keys() == HONOURED


@pytest.fixture
def own(runner):
    runner.model.generation_config = parsed({"eos_token_id": 2})
    return runner


@pytest.mark.parametrize("name", GREEDY)
def test_a_field_changes_a_greedy_text_as_in_transformers_wherever_it_is_generated(own, batch, theirs, name):
    prompt = own.tokenizer(PROMPT)["input_ids"]
    tokens = TOKENS.get(name, 8)
    sampling = Sampling(max_new_tokens=tokens)
    plain = own.complete(prompt, sampling)
    content = {"eos_token_id": 2} | with_ids({name: GREEDY[name]}, own)
    own.model.generation_config = batch.model.generation_config = parsed(content)
    alone = own.complete(prompt, sampling)
    (together,) = [answer for answers in batch.answer([BatchRequest("a", prompt, sampling)]) for answer in answers]
    floats = {name: float(value) for name, value in content.items() if name.endswith("penalty")}
    if name == "sequence_bias":
        floats = {name: [[ids, float(bias)] for ids, bias in content[name]]}
    options = GenerationConfig(**(content | floats), max_new_tokens=tokens, pad_token_id=0)
    reference = theirs.generate(torch.tensor([prompt]), generation_config=options, tokenizer=own.tokenizer)
    assert alone.token_ids == together.token_ids == reference[0, len(prompt) :].tolist()
    assert (alone.text, alone.finish_reason) == (together.text, together.finish_reason)
    assert ((alone.token_ids, alone.text) != (plain.token_ids, plain.text)) == (name not in WITHOUT_CHANGE)


@pytest.mark.parametrize("name", GREEDY)
def test_a_chat_generates_as_a_batch_does(own, batch, name):
    own.model.generation_config = batch.model.generation_config = parsed({"eos_token_id": 2, name: GREEDY[name]})
    session = Session(own, {"max_new_tokens": 2})
    answer = session.ask("How do I print a page?")
    shown = "".join(answer.pieces)
    request = BatchRequest("a", answer.prompt.ids, Sampling(max_new_tokens=2))
    (together,) = [answer for answers in batch.answer([request]) for answer in answers]
    assert (answer.ids, shown) == (together.token_ids, together.text.lstrip())


@pytest.mark.parametrize("name", [*GREEDY, *SAMPLED])
@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"temperature": 0.5}])
def test_one_prompt_and_many_are_put_through_the_same_processors(own, name, options):
    """Compare the processors of `generate`, caught in the act, and those of a batch, with all that they hold."""
    own.model.generation_config = parsed({"eos_token_id": 2, "do_sample": True} | {name: (GREEDY | SAMPLED)[name]})
    seen = []

    def caught(*arguments, **given):
        processors = type(own.model)._get_logits_processor(own.model, *arguments, **given)
        seen.append(described(processors))  # before they are used, which changes some
        return processors

    sampling = Sampling(max_new_tokens=1, seed=1, **options)
    prompt = own.tokenizer(PROMPT)["input_ids"]
    own.model._get_logits_processor = caught
    try:
        own.complete(prompt, sampling)
    finally:
        del own.model._get_logits_processor
    assert described(Sampler(own.model, sampling, prompt)._processors) == seen[0]


def described(processors) -> str:
    return str([(type(one).__name__, vars(one)) for one in processors])


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 2}, {"do_sample": True, "temperature": 2.0}),
        ({"do_sample": True, "top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),
        ({"eos_token_id": []}, {"eos_token_id": None}),
        ({"stop_strings": "icon"}, {"stop_strings": ["icon"]}),
        ({"pad_token_id": -1, "bos_token_id": None}, {"pad_token_id": None, "bos_token_id": None}),
        (
            {"num_beams": 1, "num_return_sequences": 1.0, "guidance_scale": 1.0, "penalty_alpha": 0.0},
            {"num_beams": None},
        ),
        ({"cache_implementation": "static", "compile_config": {}, "max_length": 20}, {"max_length": None}),
        ({"cache_implementation": "nonsense", "use_cache": False}, {"use_cache": None}),
        ({"prompt_lookup_num_tokens": 5, "assistant_early_exit": 2}, {"prompt_lookup_num_tokens": None}),
        ({"chat_format": "chatml", "trust_remote_code": True}, {}),
    ],
)
def test_values_become_what_transformers_takes(content, fields):
    config = parsed(content)
    assert {name: getattr(config, name) for name in fields} == fields
    assert not hasattr(config, "chat_format")


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_text_and_is_not_supported_is_refused_by_name(name):
    with pytest.raises(StoreError, match=rf"^{FILE}: {name} 4: not supported by qmix; "):
        parsed({name: 4})
    assert parsed(dict.fromkeys(REFUSED)) == parsed({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temperature": -1.0}', "temperature -1.0: must be 0 (greedy), or 0.000001 to 100; "),
        ('{"temperature": "0.7"}', "temperature: expected float | null, got str; "),
        ('{"temperature": true}', "temperature: expected float | null, got bool; "),
        ('{"temperature": 1e999}', "temperature: number out of range; "),
        ('{"temperature": NaN}', "invalid JSON: "),
        ('{"top_p": 1.5}', "top_p 1.5: must be above 0 and at most 1; "),
        ('{"top_k": 2.5}', "top_k: expected int | null, got float; "),
        ('{"top_k": -2}', "top_k -2: must be 0 (off) or more; "),
        ('{"repetition_penalty": 0}', "repetition_penalty 0.0: must be 0.01 to 100; "),
        ('{"encoder_repetition_penalty": 0}', "encoder_repetition_penalty 0.0: must be 0.01 to 100; "),
        ('{"typical_p": 0}', "typical_p: "),
        ('{"do_sample": "yes"}', "do_sample: expected bool | null, got str; "),
        ('{"eos_token_id": 4096}', "eos_token_id: 4096 is not a token id of this model (0 to 4095); "),
        ('{"bad_words_ids": [[5, -1]]}', "bad_words_ids: -1 is not a token id of this model (0 to 4095); "),
        ('{"bad_words_ids": [[]]}', "bad_words_ids[0]: "),
        ('{"stop_strings": [""]}', "stop_strings[0]: "),
        ('{"top_k": 5, "top_k": 6}', "invalid JSON: the key 'top_k' is given twice; "),
        ('[{"top_k": 5}]', "expected object, got array; "),
        ("{", "invalid JSON: "),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_file(text, message):
    with pytest.raises(StoreError) as caught:
        parse_generation_config(text.encode(), VOCABULARY, FILE)
    assert str(caught.value).startswith(f"{FILE}: {message}")
    assert "\n" not in str(caught.value)


def test_a_field_of_a_newer_transformers_is_not_passed_over(monkeypatch):
    original = GenerationConfig.__init__

    def newer(self, **options):
        original(self, **options)
        self.top_z = None

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    with pytest.raises(StoreError, match=rf"^{FILE}: top_z 3: not known to this qmix; "):
        parsed({"top_z": 3})
    assert parsed({"top_z": None}).do_sample is None


def test_options_go_over_the_models_own(own):
    own.model.generation_config = parsed({"do_sample": False, "temperature": 0.3, "eos_token_id": 2})
    plain = own.complete(PROMPT, max_new_tokens=12)
    assert plain.token_ids == own.complete(PROMPT, max_new_tokens=12, temperature=0).token_ids
    drawn = own.complete(PROMPT, max_new_tokens=12, temperature=3.0, seed=3)
    assert drawn.token_ids != plain.token_ids
    own.model.generation_config = parsed({"do_sample": True, "temperature": 0, "eos_token_id": 2})
    assert own.complete(PROMPT, max_new_tokens=12, top_p=0.9).token_ids == plain.token_ids, "0 stays greedy"


def test_texts_to_stop_at_are_the_models_and_the_options_together(own):
    whole = own.complete(PROMPT, max_new_tokens=20, temperature=0).text
    own.model.generation_config = parsed({"stop_strings": [whole[10:14]], "eos_token_id": 2})
    assert own.complete(PROMPT, max_new_tokens=20, temperature=0).text == whole[: whole.index(whole[10:14])]
    both = own.complete(PROMPT, max_new_tokens=20, temperature=0, stop=(whole[3:6],)).text
    assert both == whole[: whole.index(whole[3:6])]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
PLAUSIBLE = st.one_of(
    *(st.fixed_dictionaries({name: st.just(value)}) for name, value in (GREEDY | SAMPLED).items()),
    *(
        st.fixed_dictionaries({name: st.sampled_from([0, 1, 0.5, 1.0, 1e-9, 2, 5, -1, 100, True, "1", [1], [[1]]])})
        for name in sorted(HONOURED)
    ),
    st.dictionaries(st.sampled_from(sorted({*HONOURED, *REFUSED, *IGNORED})), VALUES, max_size=2),
)


@given(parts=st.lists(PLAUSIBLE, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_taken_chooses_a_token_and_all_else_is_one_line(runner, parts, seed):
    content = {name: value for part in parts for name, value in part.items()}
    try:
        config = parsed(content)
    except StoreError as error:
        refusal = str(error)
        event("refused")
    else:
        refusal = None
    if refusal is not None:
        assert refusal.startswith(f"{FILE}: ")
        assert "\n" not in refusal
        return
    runner.model.generation_config = config
    logits = 10 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    for options in ({}, {"temperature": 0.7}, {"ignore_eos": True}):
        sampler = Sampler(runner.model, Sampling(max_new_tokens=3, seed=seed, **options), [5, 6, 7])
        assert 0 <= sampler.sample([5, 6, 7], logits).token < VOCABULARY
