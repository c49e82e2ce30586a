"""The model's generation_config.json: every field of transformers' GenerationConfig is honoured, refused or ignored.

The decisions hold for both drivers: transformers' `generate` with one prompt, and many prompts together. Values are
normalised to the values that transformers takes: floats where a file has whole numbers, 0 where it has -1 for "off".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList

from qmix.engine.sampling import RANGES, Sampling
from qmix.errors import StoreError
from qmix.files import decode_json, read_bounded
from qmix.model.build import mixtral_config

FILE = "generation_config.json"
SIZE_LIMIT = 2**20  # bytes
REMEDY = "correct it, or remove it from the file"
PAD = 0  # never used: transformers asks for one where a sequence can end

Share = Annotated[float, Meta(gt=0, le=1)]
Cutoff = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=0)]
Bias = Annotated[float, Meta(ge=-1e4, le=1e4)]
Words = Annotated[list[int], Meta(min_length=1)]
Text = Annotated[str, Meta(min_length=1)]


class Honoured(msgspec.Struct):
    """The fields that change the text."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: Share | None = None
    typical_p: Share | None = None
    epsilon_cutoff: Cutoff | None = None
    eta_cutoff: Cutoff | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    no_repeat_ngram_size: Count | None = None
    encoder_no_repeat_ngram_size: Count | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    bad_words_ids: list[Words] | None = None
    sequence_bias: list[tuple[Words, Bias]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    stop_strings: Text | list[Text] | None = None


CARRIED = ("bos_token_id", "pad_token_id")  # no effect here; kept for callers that use the model as transformers' own
IDS = (
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "eos_token_id",
)
RANGED = {"encoder_repetition_penalty": "repetition_penalty"}  # not a field of Sampling, with the range of one
REFUSED: dict[str, tuple[Any, ...]] = {  # would change the text; with the values that turn them off
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "exponential_decay_length_penalty": (),  # its powers overflow
    "max_time": (),  # the text would depend on the machine
    "is_assistant": (False,),
    "use_mtp": (False,),
}
IGNORED = (
    frozenset(  # without effect on one text of a decoder: lengths that options state, beams, caches, output, drafts
        (
            *("max_length", "max_new_tokens"),
            *("early_stopping", "length_penalty", "diversity_penalty", "low_memory"),
            *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
            *("compile_config", "disable_compile", "continuous_batching_config"),
            *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
            *("pad_token_id", "bos_token_id", "decoder_start_token_id"),
            *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
            *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
            *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
            "transformers_version",
        )
    )
)


def model_generation_config(directory: Path, content: dict[str, Any]) -> GenerationConfig:
    """Return the generation config of a directory whose config.json has this `content`.

    Raises StoreError naming the file.
    """
    return read_generation_config(directory, mixtral_config(content, directory / "config.json"))


def read_generation_config(directory: Path, config: MixtralConfig) -> GenerationConfig:
    """Return the content of generation_config.json, or the same fields of the model's config where there is none.

    Raises StoreError naming the file and the key where a value cannot be used, or would change the text and is not
    supported.
    """
    path = directory / FILE
    if path.is_file():
        return parse_generation_config(read_bounded(path, SIZE_LIMIT, StoreError, REMEDY), config.vocab_size, path)
    own = {name: value for name, value in config.to_dict().items() if name in vars(GenerationConfig())}
    return parse_generation_config(msgspec.json.encode(own), config.vocab_size, directory / "config.json")


def with_end_of(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, vocab_size: int) -> GenerationConfig:
    """Return the config with the tokenizer's end-of-text token among the tokens that end a text.

    Fine-tuned models often have a new one, such as `<|im_end|>`, that their generation config does not name.
    """
    ends = _tokens(config.eos_token_id)
    own = tokenizer.eos_token_id
    if isinstance(own, int) and 0 <= own < vocab_size:
        config.eos_token_id = list(dict.fromkeys((*ends, own)))
    return config


def parse_generation_config(data: bytes, vocab_size: int, where: Path) -> GenerationConfig:
    """Return the config in the bytes of a file; raises as `read_generation_config` does."""
    content = decode_json(data, dict[str, Any], str(where), StoreError, REMEDY, unique=True)
    honoured = decode_json(data, Honoured, str(where), StoreError, REMEDY)
    if problem := _problem(content, honoured, vocab_size):
        raise StoreError(f"{where}: {problem}; {REMEDY}")
    carried = {name: content[name] for name in CARRIED if type(content.get(name)) is int and content[name] >= 0}
    return GenerationConfig(**_normal(honoured), **carried)


def _problem(content: dict[str, Any], honoured: Honoured, vocab_size: int) -> str | None:
    """Return what is wrong with the first bad field, or None."""
    for name, off in REFUSED.items():
        if content.get(name) is not None and content[name] not in off:
            return f"{name} {_short(content[name])}: not supported by qmix"
    decided = {*Honoured.__struct_fields__, *REFUSED, *IGNORED}
    for name in vars(GenerationConfig()).keys() - decided:
        if not name.startswith("_") and content.get(name) is not None:
            return f"{name} {_short(content[name])}: not known to this qmix"
    for name, option in ({name: name for name in RANGES if hasattr(honoured, name)} | RANGED).items():
        value = getattr(honoured, name)
        if value is not None and not (name == "top_k" and value == -1) and not RANGES[option].holds(value):
            return f"{name} {value}: must be {RANGES[option].wanted}"
    for name in IDS:
        bad = next((token for token in _tokens(getattr(honoured, name)) if not 0 <= token < vocab_size), None)
        if bad is not None:
            return f"{name}: {bad} is not a token id of this model (0 to {vocab_size - 1})"
    return None


def _tokens(value: Any) -> Iterator[int]:
    """Yield the token ids in a field's value; floats in it are biases."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tokens(part)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _normal(honoured: Honoured) -> dict[str, Any]:
    """Return the fields that are set, as transformers takes them."""
    fields = {name: value for name, value in msgspec.structs.asdict(honoured).items() if value not in (None, [])}
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if fields.get("temperature") == 0:
        fields["do_sample"] = False
    if isinstance(fields.get("stop_strings"), str):
        fields["stop_strings"] = [fields["stop_strings"]]
    if "sequence_bias" in fields:
        fields["sequence_bias"] = [[tokens, bias] for tokens, bias in fields["sequence_bias"]]
    return fields


@dataclass(frozen=True, slots=True)
class Decoding:
    """Settings of one text: transformers' options, the token ids that end it, and its stop strings."""

    config: GenerationConfig
    ends: frozenset[int]
    stops: tuple[str, ...]


def decoding(defaults: GenerationConfig, sampling: Sampling) -> Decoding:
    """Return the model's defaults with these options on top. Temperature 0 is greedy."""
    config = copy.deepcopy(defaults)
    config.update(**sampling.overrides())
    config.sequence_bias = _biases(config.sequence_bias, sampling)
    stops, config.stop_strings = (*sampling.stop, *(config.stop_strings or ())), None
    config.pad_token_id = PAD if config.pad_token_id is None else config.pad_token_id
    config.do_sample = bool(config.do_sample) and config.temperature != 0
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = config.min_p = None
    ends = [] if config.eos_token_id is None else config.eos_token_id
    return Decoding(config, frozenset(ends if isinstance(ends, list) else [ends]), stops)


def _biases(own: list[Any] | None, sampling: Sampling) -> list[Any] | None:
    """Return the model's own biases with those of the options added, as transformers takes them."""
    biases = {tuple(tokens): bias for tokens, bias in own or []}
    for token, bias in sampling.logit_bias.items():
        biases[(token,)] = biases.get((token,), 0.0) + float(bias)
    return [[list(tokens), bias] for tokens, bias in biases.items()] or None


def logits_processors(
    model: MixtralForCausalLM, config: GenerationConfig, prompt: Sequence[int], own: LogitsProcessorList
) -> LogitsProcessorList:
    """Return the processors that transformers' `generate` applies to the logits after this prompt, given `own` ones."""
    full, ids = copy.deepcopy(config), torch.tensor([prompt])
    full.update(**full._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(full, kwargs_has_attention_mask=True, device=torch.device("cpu"))
    full = model._prepare_generated_length(full, True, True, "input_ids", len(prompt), ids)
    found: LogitsProcessorList = model._get_logits_processor(
        full, len(prompt), encoder_input_ids=ids, logits_processor=own, device="cpu"
    )
    return found
