"""`python -m qmix.engine.baseline` prints the memory of a process that has done a tiny run.

A generation with a model of a few kilobytes imports every module and starts every thread pool that a real run
does; what is then resident is the part of a budget that no plan can save. With the argument `kernels`, the products
and the attention of large models are among it; with `whole`, transformers is imported as a library's user imports it.
"""

from __future__ import annotations

import sys

import prompt_toolkit  # noqa: F401 -- what a chat reads its lines with
import torch

from qmix.engine.compile_kernels import PARTS
from qmix.geometry import Geometry
from qmix.machine.found import peak_memory
from qmix.machine.kept import limit_kept_memory
from qmix.model.lean import import_libraries
from qmix.models import EMBEDDED


def main() -> None:
    if "whole" not in sys.argv:
        import_libraries()
    from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

    from qmix.model.kv import KVCache
    from qmix.precision.bitsandbytes import cpu_library, functional
    from qmix.text.tokenizer import load_tokenizer

    limit_kept_memory()
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        dtype=torch.bfloat16,
    )
    model = MixtralForCausalLM(config).to(torch.bfloat16).eval()
    cpu_library()
    functional.get_4bit_type("nf4", device="cpu")
    load_tokenizer(EMBEDDED["tiny"]).decode([5, 6, 7])
    cache = KVCache(Geometry.from_config(config.to_dict()), 64, torch.bfloat16)
    options = GenerationConfig(max_new_tokens=4, do_sample=True, pad_token_id=0, prefill_chunk_size=8)
    with torch.inference_mode():
        model.generate(
            torch.arange(1, 20)[None],
            attention_mask=torch.ones(1, 19, dtype=torch.long),
            generation_config=options,
            cache=cache,
        )
    if "kernels" in sys.argv:
        for load in PARTS:
            load()  # from the disk: they were compiled just before
    print(peak_memory())


if __name__ == "__main__":
    main()
