"""Decide whether a GPU can choose the next token by itself."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig, MixtralForCausalLM
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper

from qmix.engine.generation_config import logits_processors


def plain_temperature(
    model: MixtralForCausalLM, config: GenerationConfig, prompt: Sequence[int], own: LogitsProcessorList
) -> float | None:
    """Return the temperature if nothing but it changes the logits after this prompt, 0 for greedy; otherwise None.

    `own` are processors besides the config's.
    """
    processors = logits_processors(model, config, prompt, own)
    if not config.do_sample:
        return None if processors else 0.0
    if all(isinstance(each, TemperatureLogitsWarper) for each in processors):
        return 1.0 if config.temperature is None else float(config.temperature)
    return None
