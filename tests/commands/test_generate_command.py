"""`qmix generate` as a message, from a file, in lines of JSON; and messages in the unit system that was typed."""

from __future__ import annotations

import json
import re
import shutil

import pytest

ASK = "How do I install a package?"
GREEDY = ("-m", "tiny", "--temperature", "0", "--max-new-tokens", "12")
TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}Answer:"


def objects(done) -> list[dict]:
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_chat_answers_as_qmix_chat_does(qmix):
    done = qmix("generate", "--chat", ASK, *GREEDY)
    assert done.status == 0, done.err
    assert done.out == qmix("chat", *GREEDY[1:], stdin=ASK.encode()).out
    assert done.out != qmix("generate", ASK, *GREEDY).out


def test_a_system_prompt_and_a_template_of_ones_own(qmix, tmp_path):
    template, system = tmp_path / "template.jinja", tmp_path / "system.txt"
    template.write_text(TEMPLATE)
    system.write_text("Be short.\n")
    done = qmix("generate", "--chat-template", template, "--system-file", system, ASK, *GREEDY)
    plain = qmix("generate", f"[system] Be short.\n[user] {ASK}\nAnswer:", *GREEDY)
    assert done.status == 0, done.err
    assert done.out == plain.out.lstrip()
    refused = qmix("generate", "Hello", "--system", "x", *GREEDY)
    assert (refused.status, refused.err) == (2, "qmix: --system: only with --chat; give it, or leave it out\n")
    assert qmix("generate", ASK, *GREEDY, QMIX_SYSTEM="x").status == 0  # set for chats, of no use here


@pytest.mark.parametrize("template", ["{{ nonsense(", "{{ raise_exception('no') }}"])
def test_a_template_that_fails_is_one_line(qmix, tmp_path, template):
    (tmp_path / "template.jinja").write_text(template)
    done = qmix("generate", "--chat-template", tmp_path / "template.jinja", ASK, *GREEDY)
    assert done.status in (1, 2)
    assert len(done.lines) == 1


def test_a_model_without_a_template_is_refused(qmix, first_use, tmp_path):
    store = tmp_path / "bare"
    shutil.copytree(first_use.store, store)
    (store / "chat_template.jinja").unlink(missing_ok=True)
    done = qmix("generate", "--chat", ASK, "-m", store)
    assert done.status == 2
    assert done.lines[-1].startswith("qmix: --chat: the model has no chat template; give one with --chat-template")


def test_the_prompt_is_read_from_a_file(qmix, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(f"{ASK}\n")
    assert qmix("generate", "--prompt-file", file, *GREEDY).out == qmix("generate", ASK, *GREEDY).out
    assert "leave one of them out" in qmix("generate", ASK, "--prompt-file", file, *GREEDY).err
    file.write_text(" \n")
    assert "is empty" in qmix("generate", "--prompt-file", file, *GREEDY).err
    assert "No such file" in qmix("generate", "--prompt-file", tmp_path / "none", *GREEDY).err


def test_jsonl_streams_pieces_and_ends_each_completion_with_its_result(qmix):
    options = ("generate", ASK, "-m", "tiny", "--seed", "1", "--max-new-tokens", "6", "-n", "2", "--logprobs", "1")
    lines, whole = objects(qmix(*options, "--jsonl")), objects(qmix(*options, "--json"))
    results = [line["result"] for line in lines if "result" in line]
    assert [result["text"] for result in results] == [result["text"] for result in whole]
    for index, result in enumerate(results):
        pieces = [line for line in lines if line["completion"] == index and "text" in line]
        assert "".join(piece["text"] for piece in pieces) == result["text"]
        tokens = [token for piece in pieces for token in piece["token_ids"]]
        assert result["token_ids"] in (tokens, [*tokens, 2])  # an end-of-text token has no text
        assert len(result["logprobs"]) == len(result["token_ids"])
    assert qmix(*options, "--json", "--jsonl").status == 2
    assert "only with --json or --jsonl" in qmix("generate", ASK, "--logprobs", "1").err


def test_the_tokenizers_end_of_text_ends_a_text_that_the_generation_config_would_not(qmix, first_use, tmp_path):
    """Fine-tuned models have an end token that only their tokenizer names."""
    store = tmp_path / "store"
    shutil.copytree(first_use.store, store)
    config = json.loads((store / "generation_config.json").read_text())
    other = {**config, "eos_token_id": 5}
    (store / "generation_config.json").write_text(json.dumps(other))
    bias = ("--logit-bias", "2=100")  # the tokenizer's </s>
    (found,) = objects(qmix("generate", ASK, "-m", store, "--temperature", "0", "--json", *bias))
    assert (found["token_ids"], found["finish_reason"]) == ([2], "stop")
    (found,) = objects(qmix("generate", ASK, "-m", store, "--temperature", "0", "--json", "--logit-bias", "5=100"))
    assert found["token_ids"] == [5]


@pytest.mark.parametrize(("size", "units"), [("300MiB", "KiB|MiB|GiB|B"), ("300MB", "kB|MB|GB|B")])
def test_a_message_has_the_units_that_were_typed(qmix, size, units):
    done = qmix("generate", "Hi", "-m", "tiny", "--ram", size)
    assert done.status == 3
    found = re.findall(r"\b[\d.]+ ?([kKMGT]?i?B)\b", done.err)
    assert len(found) > 5
    assert all(re.fullmatch(units, unit) for unit in found), done.err
    enough = re.search(r"--ram (\d+M(?:iB|B))", done.err)[1]
    assert enough.endswith(size[3:])
    assert qmix("generate", "Hi", "-m", "tiny", "--ram", enough, "--max-new-tokens", "1").status == 0


def test_statistics_and_plans_have_them_too(qmix):
    done = qmix("generate", "Hi", *GREEDY, "--ram", "1GiB")
    assert re.search(r"peak \d+ MiB of 1 GiB", done.err)
    shown = qmix("plan", "mixtral-8x7b", "--ram", "32GiB", "--gpu", "none").out
    assert not re.search(r"\d ?[kMGT]B\b", shown), shown
    assert re.search(r"all experts fit in RAM with --ram [\d.]+GiB or more", " ".join(shown.split()))
    shown = qmix("plan", "mixtral-8x7b", "--ram", "32GB", "--gpu", "none").out
    assert not re.search(r"\d ?[KMGT]iB\b", shown), shown
