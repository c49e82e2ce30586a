"""Run llama.cpp on a GGUF: prefill a prompt, decode greedily, print one JSON line.

    PEER/bin/python benchmarks/llamacpp_peer.py MODEL.gguf --prompt ids.json --tokens 20

PEER is an environment with llama-cpp-python. The prompt is a JSON list of token ids, in a file or as the argument
itself. Weights are mapped from the file. With `--repack`, llama.cpp copies them into memory in the order that its
kernels prefer, which thrashes under a memory limit. Times are in seconds, memory in bytes. The prefill includes the
first token.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama  # type: ignore[import-not-found, unused-ignore]
import numpy as np


class Session:
    """A loaded model with a context."""

    def __init__(self, path: Path, context: int, threads: int, batch: int, repack: bool) -> None:
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, None)
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, batch, batch
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"{path}: llama.cpp cannot make a context of {context}")
        self._batch = batch
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def forget(self) -> None:
        """Empty the context."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def feed(self, ids: list[int]) -> int:
        """Append tokens, as many at a time as a batch holds; the likeliest next one."""
        for start in range(0, len(ids), self._batch):
            part = ids[start : start + self._batch]
            tokens = (llama.llama_token * len(part))(*part)
            if llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(part))):
                raise SystemExit("llama.cpp cannot decode: is the context too small?")
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def peak_memory() -> int:
    """Return the most memory this process held, mapped pages of the file included."""
    return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a GGUF with llama.cpp on a prompt of token ids.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", required=True, help="a JSON list of token ids, or a file that holds one")
    parser.add_argument("--tokens", type=int, default=20, help="to generate")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repack", action="store_true")
    parser.add_argument("--warm-up", action="store_true", help="read the prompt once before the clock runs")
    given = parser.parse_args()
    prompt = json.loads(given.prompt if given.prompt.startswith("[") else Path(given.prompt).read_text())
    print(json.dumps(run(prompt, **vars(given))))


def run(
    ids: list[int],
    model: Path,
    tokens: int,
    context: int,
    threads: int,
    batch: int,
    repack: bool,
    warm_up: bool,
    prompt: str,
) -> dict[str, Any]:
    clock = [time.perf_counter()]
    session = Session(model, context, threads, batch, repack)
    if warm_up:
        session.feed(ids)
        session.forget()
    clock.append(time.perf_counter())
    found = [session.feed(ids)]
    clock.append(time.perf_counter())
    while len(found) < tokens:
        found.append(session.feed(found[-1:]))
        clock.append(time.perf_counter())
    load, prefill, *decode = [after - before for before, after in pairwise(clock)]
    conditions = {"engine": "llama.cpp", "model": str(model), "repack": repack, "prompt_tokens": len(ids)}
    times = {"load_s": load, "prefill_s": prefill, "decode_s": decode}
    return conditions | times | {"token_ids": found, "peak_memory": peak_memory()}


if __name__ == "__main__":
    main()
