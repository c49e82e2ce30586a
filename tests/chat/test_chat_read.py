"""Files that a chat reads: a long one goes layer by layer."""

from __future__ import annotations

import random
from dataclasses import replace

from stores import make_store

from qmix.chat import slash
from qmix.chat.session import Session
from qmix.engine.stream import Runner
from qmix.plan import make_plan
from qmix.plan.memory import PREFILL_CHUNK


def test_a_long_file_reads_each_expert_once(tiny, tmp_path):
    """Behind a first turn, with three slots for 48 experts; the answer is the one of chunk after chunk."""
    store = make_store(tiny, tmp_path / "store")
    plan = make_plan(store.layout, 2**40, 2048, 2**28).with_slots(3)
    words = random.Random(0).choices(["install", "the", "package", "open", "a", "file", "button", "menu"], k=900)
    (tmp_path / "file").write_text(" ".join(words))
    texts, misses = [], []
    for together in (PREFILL_CHUNK, 2048):
        with Runner(store, replace(plan, prefill=together)) as runner:
            session = Session(runner, {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True})
            answers = []
            for turn in ("Hello", slash.run(f"/read {tmp_path}/file In short?", session).ask):
                answer = session.ask(turn)
                answers.append("".join(answer.pieces))
                session.keep(answer)
            texts.append(answers)
            assert answer.result.reused_tokens > 0
            assert answer.result.prefilled_tokens > PREFILL_CHUNK
            misses.append(answer.result.misses)
    assert texts[0] == texts[1]
    assert misses[1] <= store.geometry.num_records < misses[0]
