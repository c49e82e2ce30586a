"""`qmix eval`: the figures of lm-evaluation-harness's own model class, kept request by request, without a network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from card_data import write_card
from checkpoints import reference_model
from command import Commands
from killed_batches import Batches, lines_of
from lm_eval.api.instance import Instance
from stores import make_store

from qmix.commands.eval import eval as command
from qmix.errors import QmixError, UsageError
from qmix.evaluate.card import CARD
from qmix.evaluate.data import find_files, offline
from qmix.evaluate.engine import StoreEngine, Work
from qmix.evaluate.harness import QmixLM
from qmix.evaluate.report import report, run_tasks
from qmix.evaluate.results import REQUESTS, Results, identity
from qmix.evaluate.tasks import load_tasks, mute, own_tasks
from qmix.text.tokenizer import load_tokenizer

TASKS = Path(__file__).parents[1] / "evaluation"
NAMES = ["help_choice", "help_last", "help_pages", "help_words"]
PRELOADED = "qmix.evaluate.report"


@pytest.fixture(autouse=True)
def cache(first_use, monkeypatch):
    """Use the cache of a user who has run qmix before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(first_use.cache))


@pytest.fixture(scope="module")
def qmix(tmp_path_factory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("evaluations"), PRELOADED, "qmix.evaluate.tasks")
    yield running
    running.close()


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("half") / "store", "half")


def model(store, directory: Path, context: int = 2048) -> QmixLM:
    """Return a model whose `notes` are the messages to the user."""
    notes: list[str] = []
    results = Results(directory, identity(store, "here"))
    engine = StoreEngine(store, results, 2**30, None, base=2**40)  # the test's own process is none of a user's
    lm = QmixLM(engine, load_tokenizer(store.directory), context, notes.append)
    lm.notes = notes
    return lm


def made(*arguments: str) -> click.Context:
    """Run the command in this process."""
    return command.make_context("eval", list(arguments), help_option_names=["-h", "--help"])  # which click keeps


def evaluated(lm, names=NAMES, limit: int | None = None) -> tuple[dict, dict]:
    """Return the results by task and figure, and the model's answer to each request."""
    mute()
    loaded = load_tasks(list(names), TASKS, None)
    found = run_tasks(lm, loaded, limit)["results"]
    answers = {name: [request.resps[0] for request in task.instances] for name, task in loaded["tasks"].items()}
    return found, answers


@pytest.fixture(scope="module")
def harness_own(tiny):
    """HFLM on transformers' bf16 model, its softmax in fp32; by default it rounds every log-probability to 8 bits."""
    from lm_eval.models.huggingface import HFLM

    reference, tokenizer = reference_model(tiny, torch.bfloat16), load_tokenizer(tiny)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its many small operations wait for each other's threads on a busy machine
    yield lambda **options: HFLM(pretrained=reference, tokenizer=tokenizer, softmax_dtype="float32", **options)
    torch.set_num_threads(threads)


def test_figures_and_answers_are_those_of_the_harness_own_model(half, harness_own, tmp_path):
    expected, their_answers = evaluated(harness_own())
    found, answers = evaluated(model(half, tmp_path))
    for task, figure in (
        ("help_choice", "acc"),
        ("help_choice", "acc_norm"),
        ("help_last", "acc"),
        ("help_words", "exact_match"),
    ):
        assert found[task][f"{figure},none"] == expected[task][f"{figure},none"]
    assert answers["help_words"] == their_answers["help_words"]
    for ours, hers in zip(answers["help_choice"], their_answers["help_choice"], strict=True):
        assert ours[0] == pytest.approx(hers[0], abs=0.5, rel=0.02)
        assert ours[1] == hers[1]
    assert answers["help_pages"] == pytest.approx(their_answers["help_pages"], rel=5e-3)
    assert found["help_pages"]["bits_per_byte,none"] == pytest.approx(
        expected["help_pages"]["bits_per_byte,none"], rel=5e-3
    )


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("", "Click the button."), ("Click the ", "button"), ("<s>Click", " the button"), ("Click", "able menus")],
)
def test_texts_become_the_tokens_of_the_harness_own_model(half, harness_own, tmp_path, context, continuation):
    """An empty context, a space at its end, a prefix token already there, a continuation in the middle of a word."""
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((ours, _),) = model(half, tmp_path).loglikelihood([request])
    ((hers, _),) = harness_own().loglikelihood([request], disable_tqdm=True)
    assert ours == pytest.approx(hers, abs=0.3, rel=0.02)


def test_a_single_question_has_no_error_and_is_json_all_the_same(half, tmp_path):
    lm = model(half, tmp_path)
    mute()
    found = run_tasks(lm, load_tasks(["help_last"], TASKS, None), 1)
    content = report(lm, found, {"tasks": ["help_last"]})
    assert content["results"]["help_last"]["acc_stderr,none"] is None
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["model"] | {"fingerprint": ""} == {
        "name": "tiny", "fingerprint": "", "precision": "half", "dtype": "bf16"
    }  # fmt: skip


@pytest.mark.slow
def test_longer_requests_lose_their_beginning_as_in_the_harness_own_model(half, harness_own, tmp_path):
    _, expected = evaluated(harness_own(max_length=40), ("help_choice", "help_pages"))
    lm = model(half, tmp_path, context=40)
    _, found = evaluated(lm, ("help_choice", "help_pages"))
    assert found["help_pages"] == pytest.approx(expected["help_pages"], rel=5e-3)
    assert [score for score, _ in found["help_choice"]] == pytest.approx(
        [score for score, _ in expected["help_choice"]], abs=0.5, rel=0.03
    )
    assert lm.notes == ["16 of 16 requests are longer than the context of 40 tokens: their beginnings are cut off"]


def test_the_table_the_file_and_a_second_run_that_computes_nothing(qmix, tmp_path):
    options = ("eval", "tiny", "--data", TASKS, "-o", tmp_path / "out", "--ram", "1200MiB")
    done = qmix(*options)
    assert done.status == 0, done.err
    header, _, *rows = done.out.splitlines()
    assert header.split() == ["task", "figure", "shots", "questions", "value", "+/-"]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == NAMES
    assert rows[0].split()[:4] == ["help_choice", "acc", "2", "6"]
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["schema"] == "qmix-eval-1"
    assert kept["settings"] == {"tasks": NAMES, "limit": None, "num_fewshot": None, "max_length": 2048}
    assert kept["work"]["requests"] == 16 + 4 + 3 + 4
    assert kept["work"]["peak_memory"] < 1200 * 2**20
    again = qmix(*options, "--json")
    assert (again.status, again.lines[-1]) == (0, f"27 requests, 27 from earlier runs; {tmp_path}/out/results.json")
    answer = json.loads(again.out)
    assert answer["results"] == kept["results"]
    assert answer["work"]["passes"] == 0


def test_a_killed_run_goes_on_and_ends_with_the_same_results(tmp_path):
    running = Batches({}, "eval", PRELOADED, REQUESTS)
    options = ("tiny", "--data", TASKS, "--ram", "1200MiB", "--batch-tokens", "300")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    try:
        assert running(whole, *options) == 0
        rng = random.Random(3)
        for lines in (1, 6, 5):
            before = lines_of(cut / REQUESTS)
            assert running(cut, *options, after=rng.uniform(0, 0.01), lines=lines) == -9
            assert lines_of(cut / REQUESTS) >= before + lines
        assert not (cut / "results.json").exists()
        assert running(cut, *options, "--batch-tokens", "500") == 0
    finally:
        running.close()
    found, expected = (json.loads((out / "results.json").read_text()) for out in (cut, whole))
    assert found["results"] == expected["results"]
    assert found["work"]["kept"] >= 12
    assert sorted((cut / REQUESTS).read_text().splitlines()) == sorted((whole / REQUESTS).read_text().splitlines())


def test_an_interrupted_run_says_how_far_it_is(monkeypatch, tmp_path):
    def stop(self, work: Work) -> None:
        if work.passes:
            raise KeyboardInterrupt

    monkeypatch.setattr("qmix.evaluate.display.EvaluationDisplay.__call__", stop)
    arguments = ["tiny", "--data", str(TASKS), "--tasks", "help_last", "-o", str(tmp_path / "out"), "--ram", "3GiB"]
    told = "interrupted; 4 of 4 requests done, run the same command again to continue"
    with made(*arguments) as context, pytest.raises(KeyboardInterrupt, match=told):
        command.invoke(context)
    assert lines_of(tmp_path / "out" / REQUESTS) == 4


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("qmix.commands.eval.find_spec", lambda name: None)
    with made("tiny") as context, pytest.raises(UsageError, match=r"pip install .*\[eval\]"):
        command.invoke(context)


def test_missing_data_is_told_with_what_to_fetch(qmix, tmp_path):
    done = qmix("eval", "tiny", "--data", tmp_path, "--tasks", "winogrande,arc_challenge", "--ram", "1200MiB")
    assert (done.status, done.out) == (1, "")
    (line,) = done.lines
    assert line.startswith(f"qmix: winogrande, arc_challenge: the data is not in {tmp_path} (")
    for path in ("allenai/winogrande", "allenai/ai2_arc"):
        assert f"hf download --repo-type dataset {path} --local-dir {tmp_path}/{path}" in line


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (("--data", "nowhere"), 2, "--data nowhere: directory not found"),
        (("--tasks", ","), 2, "--tasks: empty"),
        (("--tasks", "card", "--num-fewshot", "3"), 2, "--num-fewshot: the tasks of `card` have their own"),
        (("--context", "4000"), 2, "--context 4000: must be 2 to 2048"),
        (("--data", str(TASKS), "--batch-tokens", "3"), 2, "--batch-tokens 3: must be at least "),
        (("--data", str(TASKS), "--ram", "100MiB"), 3, "the smallest budget that works is --ram "),
        (("--data", str(TASKS), "--context", "10", "--tasks", "help_words"), 2, "a task generates up to 12 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(qmix, tmp_path, options, status, told):
    done = qmix("eval", "tiny", "-o", tmp_path / "out", *options)
    assert (done.status, done.out) == (status, "")
    assert told in done.lines[-1]


def test_a_task_that_the_harness_does_not_take_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: multiple_choice\n")
    with pytest.raises(UsageError, match=r"broken: .* json without data_files under dataset_kwargs\); correct it"):
        load_tasks(["broken"], tmp_path, None)


def test_own_tasks_are_those_of_the_directory():
    assert own_tasks(TASKS) == NAMES


def test_examples_in_a_prompt_are_as_many_as_asked_for():
    loaded = load_tasks(["help_choice", "help_last"], TASKS, 3)
    assert {name: task.config.num_fewshot for name, task in loaded["tasks"].items()} == {
        "help_choice": 3,
        "help_last": 3,
    }


def test_the_files_of_a_data_set(tmp_path):
    for name in (
        "org/set/one/test-00000-of-00002.parquet",
        "org/set/one/test-00001-of-00002.parquet",
        "org/flat/dev.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    one = tmp_path / "org/set/one"
    parts = [str(one / f"test-0000{part}-of-00002.parquet") for part in range(2)]
    assert find_files(tmp_path / "org/set", "one") == ("parquet", {"test": parts})
    assert find_files(tmp_path / "org/set", "two") is None
    assert find_files(tmp_path / "org/flat", None) == ("json", {"dev": [str(tmp_path / "org/flat/dev.jsonl")]})


def test_a_data_set_whose_readme_says_what_is_where(tmp_path):
    folder = tmp_path / "org" / "set" / "odd"
    folder.mkdir(parents=True)
    (folder / "questions.jsonl").write_text('{"text": "Open the", "word": "menu"}\n')
    configuration = {"config_name": "one", "data_files": [{"split": "test", "path": "odd/questions.jsonl"}]}
    (folder.parent / "README.md").write_text(f"---\nconfigs: {json.dumps([configuration])}\n---\n")
    task = (TASKS / "help_last.yaml").read_text().split("dataset_kwargs:")
    rest = task[1].partition("output_type")
    named = task[0].replace("json", "org/set").replace("help_last", "from_readme") + "dataset_name: one\n"
    (tmp_path / "from_readme.yaml").write_text(named + "".join(rest[1:]))
    with offline():
        loaded = load_tasks(["from_readme"], tmp_path, None)
    assert [doc["word"] for doc in loaded["tasks"]["from_readme"].eval_docs] == ["menu"]


def test_results_are_of_one_model_and_survive_a_cut_line(tmp_path):
    with Results(tmp_path, "one") as results:
        first, second = results.key(b"score", b"a", b"bc"), results.key(b"score", b"ab", b"c")
        assert first != second
        results.add({first: [-1.5, True]})
        with pytest.raises(QmixError, match="another qmix process is writing it"):
            Results(tmp_path, "one")
    with (tmp_path / REQUESTS).open("ab") as file:
        file.write(b'{"key": "00')
    with Results(tmp_path, "one") as results:
        assert (results.get(first), results.get(second)) == ([-1.5, True], None)
        results.add({second: [3, 4]})
    with Results(tmp_path, "one") as results:
        assert results.get(second) == [3, 4]
    with Results(tmp_path, "other") as results:
        assert results.get(results.key(b"score", b"a", b"bc")) is None
    (tmp_path / REQUESTS).write_text("what\n")
    with pytest.raises(UsageError, match="line 1 is not a result of an evaluation"):
        Results(tmp_path, "one")


@pytest.mark.slow
def test_the_card_on_data_as_it_is_fetched(qmix, tmp_path):
    data = write_card(tmp_path / "data")
    options = ("eval", "tiny", "--tasks", "card", "--data", data, "-o", tmp_path / "out", "--ram", "1500MiB")
    done = qmix(*options, "--json")
    assert done.status == 0, done.err
    content = json.loads(done.out)
    assert [row["title"] for row in content["card"]] == [*(known.title for known in CARD), "average"]
    for known, row in zip(CARD, content["card"], strict=False):
        assert row["figure"] == pytest.approx(100 * content["results"][known.task][known.metric])
        assert content["n-shot"][known.task if known.task != "mmlu" else "mmlu_anatomy"] == known.shots
    assert content["n-samples"]["mmlu_anatomy"]["effective"] == 2
    table = qmix(*options)
    assert table.out.splitlines()[-1].split()[0] == "average"


@pytest.mark.slow
def test_a_name_that_is_no_task(qmix, tmp_path):
    done = qmix("eval", "tiny", "--tasks", "no_such_task", "--data", TASKS, "-o", tmp_path, "--ram", "1200MiB")
    assert (done.status, done.out) == (2, "")
    assert done.lines[-1] == f"qmix: --tasks no_such_task: not found in lm-evaluation-harness or in {TASKS}"
