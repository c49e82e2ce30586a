"""`qmix plan` as a user meets it: machines stated, the map, files, pictures, comparisons, and refusals in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qmix.units import format_flops, parse_flops, parse_rate

PROMPT = "To install a package,"
GPUS = ("--gpu", "24GiB", "--gpu", "24GiB", "--ram", "32GiB")


def planned(finished) -> dict:
    assert finished.status == 0, finished.err
    return json.loads(finished.out)


def test_a_published_model_is_planned_for_a_machine_that_is_not_there(qmix):
    found = planned(qmix("plan", "mixtral-8x22b", *GPUS, "--disk", "2TB", "--pcie", "25GB/s", "--json"))
    assert [(device["name"], device["budget"]) for device in found["devices"]] == [
        ("gpu:0", 24 * 2**30),
        ("gpu:1", 24 * 2**30),
    ]
    assert found["machine"]["rates"]["pcie"] == {"value": 25e9, "source": "stated"}
    assert found["machine"]["disk"] == 2 * 10**12
    assert found["predicted"]["decode"]["tokens_per_s"] > 1
    assert found["model"]["geometry"]["num_layers"] == 56
    assert found["commands"] == [
        "qmix generate -m mistralai/Mixtral-8x22B-v0.1 --ram 32768MiB --gpu 24576MiB --gpu 24576MiB --context 4096"
    ]


def test_a_card_is_planned_with_its_published_figures(qmix):
    found = planned(qmix("plan", "mixtral-8x7b", "--gpu", "rtx 4090", "--ram", "32GiB", "--json"))
    assert found["machine"]["card"] == "RTX 4090"
    assert found["machine"]["rates"]["gpu_memory"] == {"value": 0.8 * 1008e9, "source": "published"}
    assert found["devices"][0]["budget"] == int(24 * 2**30 * 0.98)
    shown = qmix("plan", "mixtral-8x7b", "--gpu", "24GiB", "--ram", "32GiB").out
    assert re.search(r"typical of RTX 3090: memory to GPU", " ".join(shown.split()))
    assert re.search(r"CUDA's context +│ +│ +600 MiB", shown)


def test_cards_are_compared(qmix):
    names = ("3060 12GB,32GiB", "4090,32GiB", "3090+4090,32GiB")
    done = qmix("plan", "mixtral-8x7b", *(word for name in names for word in ("--compare", name)), "--json")
    slow, fast, two = (planned(done)["machines"][name] for name in names)
    assert slow["predicted"]["decode"]["tokens_per_s"] < fast["predicted"]["decode"]["tokens_per_s"]
    assert two["machine"]["card"] == "RTX 3090 and RTX 4090"
    assert len(two["machine"]["gpus"]) == 2


@pytest.mark.parametrize("command", [("generate", "x", "-m", "tiny"), ("chat", "tiny"), ("bench", "tiny")])
def test_a_gpu_that_is_not_here_is_refused_before_any_work(qmix, command):
    done = qmix(*command, "--gpu", "24GiB")
    assert (done.status, done.out) == (2, "")
    assert "--gpu: 1 GPU given, and torch finds no GPU here" in done.err


def test_no_gpu_is_none(qmix):
    done = planned(qmix("generate", PROMPT, "-m", "tiny", "--gpu", "none", "--max-new-tokens", "2", "--json"))
    assert done["usage"]["completion_tokens"] == 2


def test_the_map_shows_every_expert_by_letters_without_colours(qmix):
    done = qmix("plan", "mixtral-8x22b", *GPUS)
    rows = re.findall(r"^  \d ([01r.]+)$", done.out, re.MULTILINE)
    assert [len(row) for row in rows] == [56] * 8
    cells = "".join(rows)
    legend = re.search(r"0 gpu:0 (\d+) 1 gpu:1 (\d+) r ram (\d+) \. disk (\d+)", done.out)
    assert legend
    assert [cells.count(letter) for letter in "01r."] == [int(count) for count in legend.groups()]
    assert len(cells) == 448


def test_a_store_larger_than_the_stated_disk_is_refused(qmix):
    done = qmix("plan", "mixtral-8x22b", "--ram", "64GB", "--disk", "50GB")
    assert done.status == 3
    assert done.err.startswith("qmix: does not fit 50 GB of disk: the store takes 82.5 GB")


def test_a_store_larger_than_the_disk_that_was_found_is_warned_of(monkeypatch):
    from collections import namedtuple

    from click.testing import CliRunner

    import qmix.machine.found
    from qmix.commands.plan import plan

    monkeypatch.setattr("qmix.plan.here.interpreter_memory", lambda kernels: 5 * 10**8)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(qmix.machine.found.shutil, "disk_usage", lambda path: usage(10**12, 0, 50 * 10**9))
    of_this = ("mixtral-8x22b", "--ram", "64GB", "--gpu", "none")
    done = CliRunner().invoke(plan, of_this)
    assert done.exit_code == 0
    assert "the store takes 82.5 GB, 50 GB are free at " in done.stderr
    assert "`qmix quantize mixtral-8x22b STORE` with STORE on a larger disk" in done.stderr
    compared = (
        "mixtral-8x22b",
        "--compare",
        "64GiB",
    )  # machines that are not this one, whose disk says nothing of them
    for quiet in ((*of_this, "--disk", "1TB"), compared, (*compared, "--disk", "1TB")):
        done = CliRunner().invoke(plan, quiet)
        assert (done.exit_code, done.stderr) == (0, "")


def test_a_stated_disk_counts_for_machines_that_are_compared(qmix):
    done = qmix("plan", "mixtral-8x22b", "--compare", "64GB", "--disk", "50GB")
    assert done.status == 3
    assert done.err.startswith("qmix: does not fit 50 GB of disk: the store takes 82.5 GB")


def test_machines_that_are_compared_are_drawn(qmix, tmp_path):
    machines = ("--compare", "24GiB,64GiB", "--compare", "none,24GiB", "--compare", "1GiB")
    done = qmix("plan", "mixtral-8x7b", *machines, "--plot", tmp_path / "both.svg")
    assert done.status == 0, done.err
    drawn = (tmp_path / "both.svg").read_text()
    assert "24GiB,64GiB: " in drawn
    assert "none,24GiB: " in drawn
    assert drawn.count("tok/s predicted") == 2  # the third does not fit


def test_machines_are_compared_side_by_side(qmix):
    done = qmix("plan", "mixtral-8x7b", "--compare", "24GiB+24GiB,64GiB", "--compare", "16GiB", "--compare", "1GiB")
    assert done.status == 0
    lines = [line for line in done.out.splitlines() if "GiB" in line]
    assert len(lines) == 3
    assert "256 / 0 / 0" in lines[0]
    assert re.search(r"0 / \d+ / \d+", lines[1])
    assert re.search(r"does not fit; needs --ram \d+MiB", lines[2])
    as_json = planned(qmix("plan", "mixtral-8x7b", "--compare", "16GiB", "--compare", "none,32GiB", "--json"))
    first, second = (as_json["machines"][name]["predicted"]["decode"] for name in ("16GiB", "none,32GiB"))
    assert first["tokens_per_s"] < second["tokens_per_s"]
    assert qmix("plan", "mixtral-8x7b", "--compare", "1GiB").status == 3


def test_a_plan_is_followed_by_chat_and_batch(qmix, tmp_path):
    made = qmix("plan", "tiny", "--ram", "600MB", "--context", "64", "--gpu", "none", "--json")
    plan, requests = tmp_path / "plan.json", tmp_path / "in.jsonl"
    plan.write_text(made.out)
    requests.write_text(json.dumps({"id": "a", "prompt": PROMPT, "max_tokens": 500, "ignore_eos": True}) + "\n")
    done = qmix("batch", requests, "-o", tmp_path / "out.jsonl", "-m", "tiny", "--plan", plan)
    assert (done.status, "of 600 MB, seed" in done.err) == (0, True)
    usage = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]["usage"]
    assert usage["total_tokens"] == 64
    assert qmix("chat", "tiny", "--plan", plan, "--ram", "1GiB").status == 2
    chat = qmix("chat", "tiny", "--plan", plan, "--temperature", "0", stdin=b"How do I print?\n")
    assert (chat.status, "of 600 MB" in chat.err) == (0, True)


def test_a_plan_with_gpus_is_none_for_a_batch(qmix, tmp_path):
    plan, requests = tmp_path / "plan.json", tmp_path / "in.jsonl"
    plan.write_text(qmix("plan", "tiny", "--ram", "2GiB", "--gpu", "2GiB", "--json").out)
    requests.write_text(json.dumps({"id": "a", "prompt": PROMPT}) + "\n")
    done = qmix("batch", requests, "-o", tmp_path / "out.jsonl", "-m", "tiny", "--plan", plan)
    assert done.status == 2
    assert "plan.json: " in done.err


def test_a_plan_is_followed_by_generate_and_bench(qmix, tmp_path):
    smallest = planned(qmix("plan", "tiny", "--json", "--context", "64"))["smallest"]
    made = qmix("plan", "tiny", "--ram", str(smallest), "--context", "64", "--json")
    (tmp_path / "plan.json").write_text(made.out)
    options = ("-m", "tiny", "--plan", tmp_path / "plan.json", "--json")
    done = planned(qmix("generate", PROMPT, *options, "--ignore-eos", "--max-new-tokens", "500"))
    assert done["memory"]["budget"] == smallest
    assert done["cache"]["misses"] > 0
    assert done["usage"]["prompt_tokens"] + done["usage"]["completion_tokens"] == 64
    bench = planned(qmix("bench", "tiny", *options[2:], "-p", "0", "-n", "4", "-r", "1"))
    assert (bench["budget"], bench["slots"], bench["context"]) == (smallest, 2, 64)
    longer = qmix("bench", "tiny", *options[2:], "-p", "512")
    assert longer.status == 2
    assert "the plan's is 64; make a plan with a larger one" in longer.err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("generate", "x", "-m", "tiny", "--plan", "{plan}"), "a model of other sizes"),
        (("generate", "x", "-m", "tiny", "--plan", "{plan}", "--ram", "1GiB"), "--plan and --ram"),
        (("bench", "tiny", "--plan", "{plan}", "--context", "9"), "--plan and --context"),
        (("generate", "x", "-m", "mixtral-8x7b"), "only usable with `plan`; to run it, use mistralai/Mixtral-8x7B"),
        (("plan", "tiny", "--gpu", "none", "--gpu", "1GiB"), "--gpu none"),
        (("plan", "tiny", "--gpu", "big"), "--gpu: 'big' is neither a size like 24GiB nor a known card"),
        (("plan", "tiny", "--gpu", "4060 ti"), "--gpu: '4060 ti' may be RTX 4060 Ti 8GB or RTX 4060 Ti 16GB"),
        (("generate", "x", "-m", "tiny", "--gpu", "RX 7900 XTX"), "--gpu: 'RX 7900 XTX' cannot run qmix"),
        (("plan", "tiny", "--compare", "1GiB+x,2GiB"), "--compare: 'x' is neither a size"),
        (("plan", "tiny", "--pcie", "fast"), "'fast' is not a rate"),
        (("plan", "tiny", "--gpu-matmul", "0"), "is not a compute rate"),
        (("plan", "tiny", "--plot", "plan.pdf"), "write it like plan.png or plan.svg"),
        (("plan", "tiny", "--precision", "auto"), "--precision auto: needs a --profile"),
        (("plan", "tiny", "--budget", "7MB"), "--budget: needs a --profile"),
        (("plan", "tiny", "--budget", "7MB", "--precision", "nf4"), "--budget and --precision nf4: leave one"),
        (("plan", "tiny", "--profile", "{plan}"), "schema 'qmix-plan-4', this qmix reads 'qmix-profile-2'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_used_is_refused(qmix, tmp_path, argv, reason):
    plan = tmp_path / "plan.json"
    plan.write_text(qmix("plan", "mixtral-8x7b", "--ram", "8GiB", "--json").out)
    done = qmix(*(argument.format(plan=plan) for argument in argv))
    assert done.status == 2
    assert reason in done.err
    assert "bug" not in done.err


def test_a_profile_places_what_is_used_and_chooses_precisions(qmix, tmp_path):
    use = [[0.9, 0.5, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]] * 6
    errors = {"nf4": [[1.0] * 7 + [5.0]] + [[1.0] * 8] * 5, "int8": [[0.1] * 8] * 6}
    content = {"schema": "qmix-profile-2", "model": {"name": "tiny", "fingerprint": None}, "use": use, "errors": errors}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(content))
    options = ("plan", "tiny", "--profile", profile, "--json", "--context", "64")
    smallest = planned(qmix(*options))["smallest"]
    found = planned(qmix(*options, "--ram", str(smallest + 4 * 131072)))
    assert [row[0] for row in found["placement"]][:5] == ["ram"] * 5
    assert all(where == "disk" for row in found["placement"] for where in row[2:])
    room = 48 * 131072 + 131072  # an int8 record of tiny is not twice one of nf4
    auto = planned(qmix(*options, "--budget", str(room)))
    assert auto["model"]["precision"] == "nf4,0.7=int8"
    assert auto["model"]["precisions"][0][7] == "int8"
    assert "--precision nf4,0.7=int8" in auto["commands"][0]
    profile.write_text(json.dumps(content | {"precisions": [["nf4"] * 8] * 5 + [["int8"] * 8]}))
    assert planned(qmix(*options))["model"]["precision"] == "nf4,5.*=int8"
    assert planned(qmix(*options, "--precision", "auto"))["model"]["precision"] == "nf4,5.*=int8"
    assert planned(qmix(*options, "--precision", "half"))["model"]["precision"] == "half"


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_plan_is_drawn(qmix, tmp_path, name):
    done = qmix("plan", "mixtral-8x22b", *GPUS, "--plot", tmp_path / name)
    assert done.status == 0, done.err
    head = (tmp_path / name).read_bytes()[:300]
    assert head.startswith(b"\x89PNG") or b"<?xml" in head
    nowhere = qmix("plan", "tiny", "--plot", tmp_path / "none" / name)
    assert nowhere.status == 1
    assert nowhere.err.endswith("choose another path for --plot\n")


def test_without_matplotlib_a_picture_is_refused_before_any_work(monkeypatch):
    from qmix.errors import UsageError
    from qmix.terminal import figure

    monkeypatch.setattr(figure.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'qmix-moe\[plot\]'"):
        figure.check_target(Path("plan.png"), "plan")


def test_rates_are_read_as_people_write_them():
    assert parse_rate("25GB/s") == parse_rate("25 GB / s") == parse_rate("25G") == 25e9
    assert parse_rate("1GiB/s") == 2**30
    assert parse_flops("80TFLOP/s") == parse_flops("80 tflops") == parse_flops("80T") == 80e12
    assert format_flops(1.04e12) == "1.04 TFLOP/s"
