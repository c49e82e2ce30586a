"""`qmix batch` as a user meets it: files, streams, exit codes, what a second run does."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
from pathlib import Path

import pexpect
import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from command import COMMAND, LIMIT_SECONDS, real
from stores import make_store

from qmix.batch.output import FileAnswers
from qmix.errors import UsageError
from qmix.kernels.cpu.paths import current

SUMMARY = (
    r"{done} of {lines} lines?(, \d+ errors?)?(, \d+ from earlier runs)?, "
    r"\d+ new tokens? in [\d.]+ s \([\d.]+ tok/s\), \d+ prompt tokens?, batch {batch}, "
    r"[\d.]+% of experts in memory, [\d.]+ ([kMG]i)?B read, peak \d+ MiB of [\d.]+ [MGT]iB, seed \d+"
)
GREEDY = ("-m", "tiny", "--temperature", "0", "--ram", "1GiB")
LINES = [{"id": f"line-{index}", "prompt": f"To install a package, {index}", "max_tokens": 6} for index in range(5)]
CHAT = {
    "messages": [{"role": "user", "content": "How do I print?"}],
    "max_tokens": 8,
    "logprobs": True,
    "top_logprobs": 2,
}


def write(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[str, dict]:
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def run(qmix, tmp_path):
    """`qmix batch` on lines, into out.jsonl."""

    def run(*lines: dict | str, options: tuple[str, ...] = ()):
        if lines:
            write(tmp_path / "in.jsonl", *lines)
        return qmix("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *GREEDY, *options)

    return run


def test_both_forms_come_back_as_openais_output(run, tmp_path):
    openai = {"method": "POST", "url": "/v1/chat/completions", "body": CHAT | {"model": "gpt-4o"}}
    completion = {
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "Open", "logprobs": 1, "max_tokens": 3},
    }
    done = run(*LINES, {"custom_id": "chat", **openai}, {"custom_id": "text", **completion})
    assert (done.status, done.out) == (0, ""), done.err
    assert done.lines[0] == "lines name 'gpt-4o' as their model; all are answered by tiny"
    assert re.fullmatch(SUMMARY.format(done=7, lines=7, batch=7), done.lines[1]), done.err
    found = read(tmp_path / "out.jsonl")
    assert found.keys() == {*(line["id"] for line in LINES), "chat", "text"}
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in found.values())
    chat, text = (found[name]["response"]["body"] for name in ("chat", "text"))
    assert (chat["object"], text["object"]) == ("chat.completion", "text_completion")
    (choice,) = chat["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "length", "assistant")
    told = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in told) == choice["message"]["content"]
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in told)
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in told)
    assert [len(token["top_logprobs"]) for token in told] == [2] * 8
    (choice,) = text["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"] == [0, *map(len, _beginnings(choice["logprobs"]["tokens"]))][:3]
    assert text["usage"]["total_tokens"] == text["usage"]["prompt_tokens"] + 3


def _beginnings(tokens: list[str]) -> list[str]:
    return ["".join(tokens[: index + 1]) for index in range(len(tokens))]


def test_a_chats_answer_is_what_generate_continues_the_template_with(qmix, tiny, tmp_path):
    options = ("-m", make_store(tiny, tmp_path / "half", "half").directory, *GREEDY[2:])
    source, output = write(tmp_path / "in.jsonl", {"id": "chat", **CHAT, "max_tokens": 24}), tmp_path / "out.jsonl"
    assert qmix("batch", source, "-o", output, *options).status == 0
    alone = qmix("generate", "<s>[INST]How do I print?[/INST]", *options, "--max-new-tokens", "24")
    (choice,) = read(output)["chat"]["response"]["body"]["choices"]
    assert choice["message"]["content"] == alone.out.removesuffix("\n")


def test_a_file_with_bad_lines_is_not_run_and_all_of_them_are_named(run, tmp_path):
    done = run(LINES[0], "x", LINES[0], LINES[1] | {"temprature": 1})
    path = tmp_path / "in.jsonl"
    assert (done.status, done.out) == (2, "")
    assert done.lines == [
        f"{path}: line 2: invalid JSON: invalid character (byte 0)",
        f"{path}: line 3: duplicate id 'line-0' (first on line 1)",
        f"{path}: line 4: unknown field 'temprature' (did you mean 'temperature'?)",
        f"qmix: {path}: 3 lines are invalid; nothing was run, correct them",
    ]
    assert not (tmp_path / "out.jsonl").exists()
    many = run(*["["] * 30)
    assert len(many.lines) == 22
    assert many.lines[20] == f"{path}: 10 more invalid lines"
    one = run(LINES[0], LINES[1] | {"seed": 10**30})
    assert (one.status, one.lines) == (
        2,
        [f"qmix: {path}: line 2: seed {10**30}: must be 0 to 2^63 - 1; nothing was run"],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no requests; give one JSON object per line"),
        (None, "No such file or directory; give a file with one JSON object per line"),
    ],
)
def test_an_input_that_holds_nothing_is_refused(qmix, tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_text(content)
    done = qmix("batch", path, "-o", tmp_path / "out.jsonl", *GREEDY)
    assert (done.status, len(done.lines)) == (2, 1)
    assert f"{path}: {message}" in done.err


def test_what_the_model_cannot_answer_is_an_error_line_and_not_the_end(run, tmp_path):
    long = {"id": "long", "prompt": "word " * 300}
    system = {"id": "turns", "messages": [{"role": "assistant", "content": "a"}] * 2}
    strange = {"id": "ids", "prompt": [4096]}
    done = run(LINES[0], long, {"id": "empty", "prompt": " "}, strange, system, options=("--context", "64"))
    found = read(tmp_path / "out.jsonl")
    assert done.status == 4
    assert re.fullmatch(SUMMARY.format(done=5, lines=5, batch=2), done.lines[-1]), done.err
    assert found["line-0"]["error"] is None
    assert found["turns"]["error"] is None
    assert [found[name]["response"] for name in ("long", "empty", "ids")] == [None] * 3
    assert [found[name]["error"]["message"] for name in ("long", "empty", "ids")] == [
        "line 2: the prompt is 1500 bytes, too long for a context of 64; shorten it, or give a larger context",
        "line 3: the prompt is empty",
        "line 4: the prompt holds the token id 4096, outside the model's vocabulary",
    ]
    again = run(options=("--context", "64"))
    assert (again.status, again.lines[-1].split(", seed")[0]) == (
        4,
        "5 of 5 lines, 3 errors, 5 from earlier runs",
    )


def test_a_system_text_goes_into_the_first_turn_where_the_template_has_none(run, tmp_path):
    folded = [{"role": "user", "content": "Be kind.\n\nHello"}]
    apart = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    done = run({"id": "a", "messages": folded, "max_tokens": 9}, {"id": "b", "messages": apart, "max_tokens": 9})
    assert done.lines[0] == "the chat template has no system role; the system prompt goes into the first turn"
    one, other = (read(tmp_path / "out.jsonl")[name]["response"]["body"]["choices"] for name in "ab")
    assert one == other


def test_a_chat_with_a_model_without_a_template_is_an_error_line(qmix, tiny, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", random_weights(TINY_CONFIG), TINY_CONFIG, tokenizer=tiny)
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    store = make_store(checkpoint, tmp_path / "store")
    assert not (store.directory / "chat_template.jinja").exists()
    source = write(tmp_path / "in.jsonl", {"id": "a", **CHAT}, {"id": "b", "prompt": [3, 4], "max_tokens": 2})
    done = qmix("batch", source, "-o", tmp_path / "out.jsonl", "-m", store.directory)
    assert done.status == 4, done.err
    assert "has no chat template" in read(tmp_path / "out.jsonl")["a"]["error"]["message"]
    assert read(tmp_path / "out.jsonl")["b"]["error"] is None


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_lines(run, tmp_path):
    assert run(*LINES).status == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    first, rest = whole.split(b"\n", 1)
    (tmp_path / "out.jsonl").write_bytes(first + b"\n" + rest[:40])
    done = run()
    assert (done.status, ", 1 from earlier runs, " in done.err) == (0, True)
    assert read(tmp_path / "out.jsonl") == {line["custom_id"]: line for line in map(json.loads, whole.splitlines())}
    before = (tmp_path / "out.jsonl").read_bytes()
    again = run()
    assert (again.status, again.lines[-1].split(", seed")[0]) == (0, "5 of 5 lines, 5 from earlier runs")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_draws_without_a_seed_go_on_from_the_seed_of_the_first_run(qmix, tmp_path):
    source, output = write(tmp_path / "in.jsonl", *LINES), tmp_path / "out.jsonl"
    argv = ("batch", source, "-o", output, "-m", "tiny", "--temperature", "1", "--ram", "1GiB")
    assert qmix(*argv).status == 0
    whole = read(output)
    assert len({line["response"]["body"]["choices"][0]["text"] for line in whole.values()}) == len(LINES)
    output.write_bytes(output.read_bytes().splitlines(keepends=True)[2])
    assert qmix(*argv).status == 0
    assert read(output) == whole


@pytest.mark.parametrize(
    ("lines", "options", "differs"),
    [
        ([*LINES, {"id": "new", "prompt": "a"}], (), "another input"),
        (LINES, ("--max-new-tokens", "9"), "--max-new-tokens 256, now 9"),
        (LINES, ("--seed", "4", "--stop", "x"), '--stop [], now ["x"]; --seed null, now 4'),
    ],
)
def test_answers_of_another_run_are_left_alone_and_the_difference_is_said(run, tmp_path, lines, options, differs):
    assert run(*LINES).status == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    done = run(*lines, options=options)
    assert done.status == 2
    assert f"out.jsonl: has answers from another run ({differs}); use the options of that run" in done.lines[-1]
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_answers_of_another_kind_of_processor_are_not_mixed_with_these(run, tmp_path):
    """The manifest says where answers were computed; here it is changed, as if another machine had begun."""
    assert run(*LINES[:2]).status == 0
    manifest = tmp_path / "out.jsonl.qmix.json"
    content = json.loads(manifest.read_text())
    here = content["subject"]["computed on"]
    assert here == f"CPU ({current().name})"
    content["subject"]["computed on"] = "NVIDIA GeForce RTX 4090, CPU (avx2)"
    manifest.write_text(json.dumps(content))
    done = run()
    assert done.status == 2
    assert f'(computed on "NVIDIA GeForce RTX 4090, CPU (avx2)", now "{here}")' in done.lines[-1]


def test_a_file_that_is_no_output_is_left_alone(run, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    assert run(*LINES).lines == [
        f"qmix: {output}: line 1 is not an answer of a batch: invalid JSON: invalid character (byte 0); "
        "choose another name, or delete the file"
    ]
    output.write_text(json.dumps({"custom_id": "a", "error": None}) + "\n")
    assert "exists without its out.jsonl.qmix.json" in run().lines[-1]
    assert output.read_text() == json.dumps({"custom_id": "a", "error": None}) + "\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "expected object, got array"),
        ('{"custom_id": 5, "error": null}', "custom_id: expected str, got int"),
        ('{"custom_id": "a"}', "object missing required field error"),
        ('{"custom_id": "a", "error": "no"}', "error: expected object | null, got str"),
        ("[" * 100_000, "expected object, got array"),
        ('{"error": ' + "[" * 100_000, "error: expected object | null, got array"),
    ],
)
def test_answers_that_are_damaged_are_named_by_their_line(tmp_path, line, told):
    output = tmp_path / "out.jsonl"
    output.write_text('{"custom_id": "a", "error": null}\n' + line + "\n")
    with pytest.raises(UsageError) as raised:
        FileAnswers(output)
    remedy = "choose another name, or delete the file"
    assert str(raised.value) == f"{output}: line 2 is not an answer of a batch: {told}; {remedy}"


MANIFEST = {"schema": "qmix-batch-1", "subject": {"input": "a"}, "chosen": {"seed": 1, "created": 2}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "invalid JSON: Input data was truncated"),
        ("[]", "expected object, got array"),
        (json.dumps(MANIFEST | {"subject": []}), "subject: expected object, got array"),
        (json.dumps(MANIFEST | {"chosen": {"seed": "x", "created": 2}}), "chosen.seed: expected int, got str"),
        (json.dumps(MANIFEST | {"chosen": {"seed": -1, "created": 2}}), "chosen.seed: expected int >= 0"),
        (json.dumps(MANIFEST | {"chosen": {"seed": 1}}), "chosen: object missing required field created"),
        (json.dumps(MANIFEST | {"schema": "qmix-batch-9"}), "from another version of qmix"),
    ],
)
def test_a_manifest_that_is_damaged_is_named(tmp_path, content, told):
    output = tmp_path / "out.jsonl"
    output.write_text('{"custom_id": "a", "error": null}\n')
    (tmp_path / "out.jsonl.qmix.json").write_text(content)
    with FileAnswers(output) as answers, pytest.raises(UsageError) as raised:
        answers.begin({"input": "a"}, {"seed": 3, "created": 4}, 1)
    assert str(raised.value) == f"{output}.qmix.json: {told}; choose another name for the answers"


@pytest.mark.parametrize("name", ["/dev/full", "/dev/null", "directory", "fifo"])
def test_answers_go_to_a_regular_file_only(qmix, tmp_path, name):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    source, output = write(tmp_path / "in.jsonl", *LINES), tmp_path / name
    done = qmix("batch", source, "-o", output, *GREEDY)
    told = f"qmix: {output}: not a regular file; choose another place for the answers\n"
    assert (done.status, done.out, done.err) == (2, "", told)


def test_requests_may_come_through_a_pipe(qmix, tmp_path):
    """A device that has no end is one, too."""
    done = qmix("batch", "/dev/stdin", "-o", tmp_path / "out.jsonl", *GREEDY, stdin=json.dumps(LINES[0]).encode())
    assert (done.status, read(tmp_path / "out.jsonl").keys()) == (0, {"line-0"}), done.err
    endless = qmix("batch", "/dev/zero", "-o", tmp_path / "zero.jsonl", *GREEDY)
    told = "line 1: longer than 4194304 bytes; shorten it (the lines after it were not checked); nothing was run"
    assert (endless.status, endless.err) == (2, f"qmix: /dev/zero: {told}\n")
    os.mkfifo(tmp_path / "fifo")
    write(tmp_path / "one", LINES[0])
    with subprocess.Popen(["sh", "-c", 'exec cat "$1" > "$2"', "sh", tmp_path / "one", tmp_path / "fifo"]) as writer:
        piped = qmix("batch", tmp_path / "fifo", "-o", tmp_path / "piped.jsonl", *GREEDY)
        assert writer.wait() == 0
    assert (piped.status, read(tmp_path / "piped.jsonl")["line-0"]["error"]) == (0, None), piped.err


def test_openais_fields_are_taken_or_are_error_lines_of_their_own(run, tmp_path):
    """A file as people have them for OpenAI: what changes nothing is taken, the others are told by name."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    bodies = {
        "plain": chat,
        "neutral": chat | {"tools": None, "logit_bias": {}, "frequency_penalty": 0, "response_format": {"type": "text"},
                           "metadata": {"k": "v"}, "top_logprobs": 0, "stream_options": None, "store": False},
        "named": chat | {"messages": [{"role": "user", "content": "x", "name": "bob"}]},
        "developer": chat | {"messages": [{"role": "developer", "content": "x"}]},
        "tools": chat | {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "two": chat | {"n": 2},
        "image": chat | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
    }  # fmt: skip
    envelope = {"method": "POST", "url": "/v1/chat/completions"}
    done = run(*({"custom_id": name, **envelope, "body": body} for name, body in bodies.items()))
    found = read(tmp_path / "out.jsonl")
    assert done.status == 4, done.err
    texts = {name: found[name]["response"]["body"]["choices"] for name in ("plain", "neutral", "named", "developer")}
    assert found["two"]["response"]["body"]["choices"] == [texts["plain"][0], texts["plain"][0] | {"index": 1}]
    assert texts["plain"] == texts["neutral"] == texts["named"] == texts["developer"]
    assert [found[name]["error"]["message"] for name in ("tools", "image")] == [
        "line 5: tools: qmix takes only null or [] (no tools are called); leave it out",
        "line 7: messages[0].content[0]: type 'image_url': the model reads text only",
    ]


def test_what_is_far_too_long_is_an_error_line_too(run, tmp_path):
    messages = [{"role": ("user", "assistant")[index % 2], "content": ""} for index in range(2101)]
    long = [{"id": "text", "prompt": "word " * 300_000}, {"id": "ids", "prompt": [5] * 200_000}]
    done = run(LINES[0], *long, {"id": "chat", "messages": [{"role": "user", "content": "word " * 9000}]},
               {"id": "turns", "messages": messages})  # fmt: skip
    found = read(tmp_path / "out.jsonl")
    assert (done.status, found["line-0"]["error"]) == (4, None), done.err
    ending = "too long for a context of 2048, the model's longest; shorten it"
    assert [found[name]["error"]["message"] for name in ("text", "ids", "chat", "turns")] == [
        f"line 2: the prompt is 1500000 bytes, {ending}",
        f"line 3: the prompt is 200000 tokens, {ending}",
        f"line 4: the prompt is 45016 bytes, {ending}",
        f"line 5: the prompt has 2101 messages, {ending}",
    ]


def test_input_and_output_are_not_the_same_file(qmix, tmp_path):
    source = write(tmp_path / "in.jsonl", *LINES)
    done = qmix("batch", source, "-o", source, *GREEDY)
    assert (done.status, done.err) == (2, f"qmix: {source}: is also the input; choose another name for the answers\n")
    assert len(source.read_text().splitlines()) == len(LINES)


def test_two_runs_do_not_share_an_output(run, tmp_path):
    with (tmp_path / "out.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run(*LINES)
    assert (done.status, len(done.lines)) == (1, 1)
    assert "out.jsonl: another qmix process is writing it; wait until it ends" in done.err


def test_a_full_disk_loses_nothing_and_the_run_goes_on_later(qmix, tmp_path):
    """The disk is a limit on the size of files, which ends in the middle of a line."""
    source, output = write(tmp_path / "in.jsonl", *LINES), tmp_path / "out.jsonl"
    options = (*GREEDY, "--batch", "1", "--seed", "1")
    assert qmix("batch", source, "-o", output, *options).status == 0
    whole = read(output)
    output.unlink()
    full = subprocess.run(
        ["sh", "-c", 'ulimit -f 2 && exec "$@"', "sh", *COMMAND, "batch", source, "-o", output, *options],
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert full.returncode == 1
    assert "out.jsonl: File too large; write to a disk that takes larger files" in full.stderr
    assert "Run the same command again to continue" in full.stderr
    assert 1 <= len(read(output)) < len(LINES)
    assert qmix("batch", source, "-o", output, *options).status == 0
    assert {name: _timeless(line) for name, line in read(output).items()} == {
        name: _timeless(line) for name, line in whole.items()
    }


def _timeless(line: dict) -> dict:
    """Without the second in which its run was begun."""
    line["response"]["body"].pop("created")
    return line


def test_stdin_and_stdout(qmix, tmp_path):
    source = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    done = qmix("batch", "-", "-o", "-", *GREEDY, stdin=source)
    assert done.status == 0, done.err
    assert {json.loads(line)["custom_id"] for line in done.out.splitlines()} == {line["id"] for line in LINES}
    assert list(tmp_path.iterdir()) == []
    both = qmix("batch", "-", "-o", "-", "--json", *GREEDY, stdin=source)
    assert (both.status, both.out) == (2, "")
    assert "stdin: line 1: invalid JSON" in qmix("batch", "-", "-o", "-", *GREEDY, stdin=b"x").err


def test_the_summary_is_one_json_object(run):
    done = run(*LINES, {"id": "empty", "prompt": ""}, options=("--json", "--seed", "3", "--batch", "2"))
    found = json.loads(done.out)
    assert done.status == 4
    assert {name: found[name] for name in ("schema", "lines", "answered", "refused", "resumed", "batch", "seed")} == {
        "schema": "qmix-batch-1", "lines": 6, "answered": 5, "refused": 1, "resumed": 0, "batch": 2, "seed": 3,
    }  # fmt: skip
    assert found["new_tokens"] == 30
    assert found["tok_s"] == pytest.approx(30 / found["seconds"])
    assert 0 < found["peak_memory"] <= found["budget"] == 2**30


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_works(run, tmp_path):
    done = run(*LINES, options=("--ram", "100MiB"))
    smallest = re.search(r"the smallest budget that works is --ram (\d+)MiB", done.err)
    assert done.status == 3
    assert smallest is not None
    assert run(options=("--ram", f"{smallest[1]}MiB", "--json")).status == 0
    assert (tmp_path / "out.jsonl").exists()


LONG = [{"id": f"line-{i}", "prompt": f"To {i}", "max_tokens": 1500, "ignore_eos": True} for i in range(1, 9)]


def test_a_bar_with_rate_and_time_left_and_a_ctrl_c_that_says_how_to_go_on(qmix, tmp_path):
    source = write(tmp_path / "in.jsonl", {"id": "short", "prompt": "Click", "max_tokens": 2}, *LONG)
    argv = ["batch", str(source), "-o", str(tmp_path / "out.jsonl"), *GREEDY, "--context", "2000"]
    terminal = pexpect.spawn(COMMAND[0], [*COMMAND[1:], *argv], dimensions=(24, 80), env=os.environ, encoding="utf-8",
                             timeout=LIMIT_SECONDS)  # fmt: skip
    terminal.expect(r"1/9 lines +[\d.]+ tok/s +\d+ (s|min|h) left")
    terminal.send("\x03")
    terminal.expect(r"qmix: interrupted; ([1-8]) of 9 lines done, run the same command again to continue\r\n")
    done = int(terminal.match[1])  # one, or more where the machine was slow to hand the key over
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.signalstatus) == (130, None)
    found = read(tmp_path / "out.jsonl").keys()
    assert "short" in found
    assert len(found) == done


def test_it_stays_within_its_budget_with_a_pool_of_few_experts(qmix, tmp_path):
    """The plan's total is the peak, the arena taken at once; the longer prompts together are several chunks."""
    store = make_store(
        write_checkpoint(tmp_path / "checkpoint", random_weights(WIDE), WIDE, tokenizer=_tiny()), tmp_path / "store"
    )

    def line(i: int) -> dict:
        return {"id": str(i), "prompt": [5, i + 3] * (1 + 60 * (i % 2)), "max_tokens": 20}

    source = write(tmp_path / "in.jsonl", *(line(i) for i in range(40)))
    argv = ("-m", store.directory, "--ram", "620MiB", "--json")
    done = real("batch", source, "-o", tmp_path / "out.jsonl", *argv)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["peak_memory"] <= found["budget"]
    assert found["new_tokens"] > 40


WIDE = TINY_CONFIG | {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2, "vocab_size": 4096}


def _tiny() -> Path:
    return Path(__file__).parents[2] / "qmix" / "models" / "tiny"
