"""transformers' own tests of models and of generation, run on a qmix model beside a plain one.

They are taken from a checkout of transformers that QMIX_TRANSFORMERS_CHECKOUT names, at about the installed version;
`pip install parameterized` for them. Every test that a plain model in the same half precision passes must be passed
by qmix, or stand in docs/python.md with its reason.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from stores import make_pool, make_store

from qmix.model.build import build_model

CHECKOUT = os.environ.get("QMIX_TRANSFORMERS_CHECKOUT", "")
DOCS = Path(__file__).parents[2] / "docs" / "python.md"


class Plain:
    """Makes models as transformers does, and rounds them to bf16."""

    def made(self, config):
        return transformers.MixtralForCausalLM(config).to(torch.bfloat16)

    def opened(self, *arguments, **options):
        found = transformers.MixtralForCausalLM.from_pretrained(*arguments, **options)
        return (found[0].to(torch.bfloat16), found[1]) if isinstance(found, tuple) else found.to(torch.bfloat16)


class Qmix:
    """Makes the same models, puts them into stores in half precision and opens those."""

    def made(self, config):
        with tempfile.TemporaryDirectory() as directory:
            Plain().made(config).save_pretrained(directory)
            model = self.opened(directory, attn_implementation=config._attn_implementation)
        model.generation_config = transformers.GenerationConfig.from_model_config(config)
        return model.train().requires_grad_(True)

    def opened(self, pretrained_model_name_or_path, attn_implementation="sdpa", dtype=None):
        scratch = tempfile.mkdtemp()
        try:
            store = make_store(Path(pretrained_model_name_or_path), Path(scratch) / "store", "half")
            pool = make_pool(store, store.geometry.num_records)
            return build_model(store, pool, "eager" if attn_implementation == "eager" else "sdpa")
        finally:
            shutil.rmtree(scratch)  # the open files stay readable


def model_class(maker):
    """A class as the suite wants it: called with a config, or opened from a directory."""

    class MixtralForCausalLM(transformers.MixtralForCausalLM, transformers.GenerationMixin):
        def __new__(cls, config):
            return maker.made(config)

        @classmethod
        def from_pretrained(cls, *arguments, **options):
            return maker.opened(*arguments, **options)

        @classmethod
        def _from_config(cls, config, **options):
            if "attn_implementation" in options:
                config._attn_implementation = options["attn_implementation"]
            return maker.made(config)

    return MixtralForCausalLM


class Tester:
    """A small random Mixtral and inputs for it, by the names that the mixins ask for."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, pad_token_id = 32, 2, 4, 0

    def get_config(self):
        return transformers.MixtralConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=40,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=self.hidden_size // self.num_attention_heads,
            num_local_experts=8,
            max_position_embeddings=512,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def outcomes(maker) -> dict[str, str]:
    """Test name to "passed", "skipped" or what went wrong in it."""
    mixins = importlib.import_module("tests.test_modeling_common")
    generation = importlib.import_module("tests.generation.test_utils")

    class Suite(mixins.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (model_class(maker),)

        def setUp(self):
            self.model_tester = Tester()

    names = unittest.TestLoader().getTestCaseNames(Suite)
    found = {}
    for name in names:
        result = unittest.TestResult()
        torch.manual_seed(0)
        Suite(name).run(result)
        wrong = [text for _, text in result.failures + result.errors]
        found[name] = wrong[0] if wrong else "skipped" if result.skipped else "passed"
    return found


@pytest.fixture
def checkout(monkeypatch):
    if not CHECKOUT:
        pytest.skip("QMIX_TRANSFORMERS_CHECKOUT names no checkout of transformers")
    pytest.importorskip("parameterized")
    monkeypatch.syspath_prepend(CHECKOUT)
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
def test_what_a_plain_model_passes_qmix_passes_or_the_documentation_says_why_not(checkout):
    plain, ours = outcomes(Plain()), outcomes(Qmix())
    listed = set(re.findall(r"^\| `(test_\w+)` \|", DOCS.read_text(), re.MULTILINE))
    differ = {name: ours[name] for name, outcome in plain.items() if outcome == "passed" != ours[name]}
    assert len([outcome for outcome in plain.values() if outcome == "passed"]) > 100
    assert differ.keys() == listed & plain.keys(), "\n".join(f"{name}: {why[-500:]}" for name, why in differ.items())
