"""Compare libraries that constrain decoding to a JSON schema: llguidance, which qmix uses, and xgrammar.

    python benchmarks/structured_output.py --model ~/Mixtral-8x7B-Instruct-v0.1 --rounds 20

Each library runs in a process of its own on one thread. It follows the same documents, a token at a time, and makes the
mask of the next token before each. Times are the processor's, so that a busy machine changes them little. A model's
step is the ceiling: 32,000 logits are read and written in about 10 us.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from qmix.models import EMBEDDED
from qmix.text.tokenizer import load_tokenizer

TEXT: dict[str, Any] = {"type": "string"}
NUMBER: dict[str, Any] = {"type": "number"}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "flat": (
        {"type": "object", "properties": {"name": TEXT, "age": {"type": "integer"}, "member": {"type": "boolean"}}},
        {"name": "Ada Lovelace, the first programmer of the world", "age": 36, "member": True},
    ),
    "nested": (
        {
            "type": "object",
            "properties": {
                "items": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"kind": {"enum": ["book", "film"]}, "title": TEXT, "price": NUMBER},
                    },
                }
            },
        },
        {"items": [{"kind": "film", "title": f"The long title of number {i}", "price": 9.99} for i in range(6)]},
    ),
    "recursive": (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"value": NUMBER, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                }
            },
            "$ref": "#/$defs/node",
        },
        {"value": 1, "children": [{"value": i, "children": [{"value": -0.5, "children": []}]} for i in range(6)]},
    ),
    "patterns": (
        {
            "type": "object",
            "properties": {
                "date": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
                "code": {"type": "string", "pattern": "^[A-Z]{2,5}[0-9]+$"},
                "count": {"type": "integer", "minimum": 1, "maximum": 5000},
                "note": {"type": "string", "maxLength": 60},
            },
        },
        {"date": "2024-05-17", "code": "QMX2048", "count": 1234, "note": "a short text of some words"},
    ),
    "wide": (
        {"type": "object", "properties": {f"field_{i}": TEXT if i % 2 else NUMBER for i in range(50)}},
        {f"field_{i}": "some words" if i % 2 else i for i in range(50)},
    ),
}
Matcher = tuple[Callable[[], object], Callable[[int], bool]]  # makes the mask, takes a token


def llguidance_compiler(tokenizer: PreTrainedTokenizerBase, vocabulary: int, end: int) -> Callable[[str], Matcher]:
    import llguidance
    import llguidance.hf
    import llguidance.numpy

    known = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=[end])
    mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary)

    def compiled(schema: str) -> Matcher:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        matcher = llguidance.LLMatcher(known, grammar)
        return lambda: llguidance.numpy.fill_next_token_bitmask(matcher, mask), matcher.consume_token

    return compiled


def xgrammar_compiler(tokenizer: PreTrainedTokenizerBase, vocabulary: int, end: int) -> Callable[[str], Matcher]:
    import xgrammar

    known = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=[end])
    compiler = xgrammar.GrammarCompiler(known, max_threads=1, cache_enabled=False)
    mask = xgrammar.allocate_token_bitmask(1, vocabulary)

    def compiled(schema: str) -> Matcher:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema))
        return lambda: matcher.fill_next_token_bitmask(mask), matcher.accept_token

    return compiled


LIBRARIES = {"llguidance": llguidance_compiler, "xgrammar": xgrammar_compiler}


def measure(library: str, model: Path, rounds: int) -> dict[str, Any]:
    """Return times in microseconds and memory in bytes of one library, for each case."""
    tokenizer = load_tokenizer(model)
    vocabulary, end = len(tokenizer), int(tokenizer.eos_token_id)
    memory, start = psutil.Process().memory_info().rss, time.process_time()
    compiled = LIBRARIES[library](tokenizer, vocabulary, end)
    found: dict[str, Any] = {"vocabulary": vocabulary, "prepare_s": time.process_time() - start, "cases": {}}
    for name, (schema, document) in CASES.items():
        whole = strict(schema)
        text = json.dumps(document, separators=(",", ":"))
        ids = tokens_after_line_end(tokenizer, text)
        compiling, masks = [], []
        for _ in range(rounds):
            start = time.process_time()
            mask, take = compiled(json.dumps(whole))
            compiling.append(time.process_time() - start)
            for token in ids:
                start = time.process_time()
                mask()
                masks.append(time.process_time() - start)
                if not take(token):
                    raise SystemExit(f"{library} refuses {tokenizer.decode([token])!r} in {text}")
        found["cases"][name] = {
            "compile_us": 1e6 * statistics.median(compiling),
            "mask_us": 1e6 * statistics.median(masks),
            "mask_mean_us": 1e6 * statistics.mean(masks),
            "mask_p99_us": 1e6 * statistics.quantiles(masks, n=100)[98],
            "first_us": 1e6 * compiling[0],
        }
    found["memory"] = psutil.Process().memory_info().rss - memory
    return found


def tokens_after_line_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text inside a longer one: at the beginning many tokenizers add a space."""
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    tokens = [token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids)]
    return next(ids[at:] for at in range(len(ids)) if "".join(tokens[at:]) == text)


def strict(schema: Any) -> Any:
    """Return a schema in which objects have all of their properties, in their order, and no others."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    whole = {name: strict(part) for name, part in schema.items()}
    if schema.get("type") == "object":
        whole |= {"required": list(schema["properties"]), "additionalProperties": False}
    return whole


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=EMBEDDED["tiny"], help="a directory with a tokenizer")
@click.option("--rounds", default=20, show_default=True)
@click.option("--only", type=click.Choice(list(LIBRARIES)), help="measure in this process and print JSON")
def main(model: Path, rounds: int, only: str | None) -> None:
    """Print the libraries' times a token, a schema and a tokenizer, and the memory that they take."""
    if only is not None:
        print(json.dumps(measure(only, model, rounds)))
        return
    table = Table(title=f"constrained decoding, {model.name}, {rounds} rounds, one thread")
    for column in ("library", "schema", "compile us", "mask us", "mean", "p99"):
        table.add_column(column)
    results = {}
    for library in LIBRARIES:
        command = [sys.executable, __file__, "--model", str(model), "--rounds", str(rounds), "--only", library]
        results[library] = found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for name, case in found["cases"].items():
            keys = ("compile_us", "mask_us", "mask_mean_us", "mask_p99_us")
            table.add_row(library, name, *(f"{case[key]:.0f}" for key in keys))
        prepared = f"{1e3 * found['prepare_s']:.0f} ms, {found['memory'] / 2**20:.0f} MiB"
        table.add_row(library, f"tokenizer of {found['vocabulary']}", prepared, "", "", "")
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
