"""transformers without what a run does not use: what is loaded, what is said, and what still works afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

HEAVY = ("PIL", "scipy", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx")
LEAN = "from qmix.model.lean import import_libraries; import_libraries();"
GENERATE = """
import json, sys
from qmix.engine.load import load
with load("tiny", ram="2GiB") as runner:
    result = runner.complete("To install a package,", max_new_tokens=24, seed=5, **json.loads(sys.argv[1]))
    inputs = runner.model(runner.model.dummy_inputs["input_ids"][:1, :2]).logits.argmax(-1).tolist()
print(json.dumps([result.token_ids, inputs, sorted(sys.modules)]))
"""


def said(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


SELDOM = [
    pytest.param(options, marks=pytest.mark.slow)
    for options in ({"draft_ngram": 3}, {"temperature": 0}, {"top_p": 0.9, "min_p": 0.01})
]


@pytest.mark.parametrize("options", [{}, *SELDOM])
def test_the_text_is_that_of_whole_libraries_and_nothing_heavy_is_loaded(qmix, options):
    *lean, loaded = json.loads(said(LEAN + GENERATE, json.dumps(options)))
    *whole, everything = json.loads(said(GENERATE, json.dumps(options)))
    assert lean == whole
    assert [name for name in HEAVY if name in loaded] == []
    assert {"torch._dynamo", "sympy", "torch.distributed.tensor"} <= set(everything)  # or there is nothing to leave out


def test_what_was_left_out_can_be_imported_afterwards():
    code = LEAN + (
        "import sympy, torch._dynamo, torch.distributed.tensor, torch.export;"
        "f = torch.compile(lambda x: x + 1, backend='eager');"
        "print(sympy.Symbol('x') + 1, int(f(torch.ones(()))), torch.distributed.tensor.DTensor.__module__)"
    )
    assert said(code) == "x + 1 2 torch.distributed.tensor\n"


def test_a_transformers_that_cannot_be_imported_so_is_imported_whole():
    code = (
        "import sys; from qmix.model import lean; lean.USED = (*lean.USED, 'transformers.not_there');"
        "lean.import_libraries();"
        "from transformers import GPT2Config, MixtralForCausalLM;"
        "print('torch.distributed.tensor' in sys.modules, MixtralForCausalLM.__module__, GPT2Config().n_layer)"
    )
    assert said(code) == "True transformers.models.mixtral.modeling_mixtral 12\n"


def test_a_process_that_has_transformers_keeps_it_whole():
    code = f"import sys, transformers.modeling_utils; {LEAN} print('torch.distributed.tensor' in sys.modules)"
    assert said(code) == "True\n"


def test_tokenizers_of_any_class_are_the_same(tmp_path, tiny):
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    kinds = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast", "Unknown")
    for kind in kinds:
        shutil.copytree(tiny, tmp_path / kind, ignore=shutil.ignore_patterns("*.safetensors", "recipe"))
        (tmp_path / kind / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": kind}))
    code = """
import os, sys; from pathlib import Path; from qmix.text.tokenizer import load_tokenizer
for directory in sys.argv[1:]:
    if os.fork() == 0:  # each kind as the first
        t = load_tokenizer(Path(directory)); print(type(t).__name__, t('Hello, world! 12 naïve').input_ids)
        sys.exit()
    os.wait()
"""
    directories = [str(tmp_path / kind) for kind in kinds]
    lean, whole = said(LEAN + code, *directories), said(code, *directories)
    assert lean == whole
    assert len(lean.splitlines()) == len(kinds)
