"""`qmix calibrate`, and the uses of its profile: a plan, a store, a run."""

from __future__ import annotations

import json

import pytest

from qmix.store.opened import open_store
from qmix.store.profile import read_profile

TOKENS = 3000
NF4, INT8 = 6291456, 12042240  # bytes of all of tiny's experts


@pytest.fixture(scope="module")
def calibrated(commands, first_use, tmp_path_factory):
    """Return the directory of a calibration of tiny on the bundled texts, and the command's output."""
    directory = tmp_path_factory.mktemp("calibrated")
    budget = str((NF4 + INT8) // 2)
    argv = ("calibrate", "tiny", directory / "profile.json", "--tokens", str(TOKENS), "--budget", budget)
    options = ("--plot", directory / "pictures.svg", "--ram", "2GiB")
    done = commands(*argv, *options, XDG_CACHE_HOME=str(first_use.cache))
    assert done.status == 0, done.err
    return directory, done


def test_the_profile_says_what_was_measured(calibrated):
    directory, _ = calibrated
    content = json.loads((directory / "profile.json").read_text())
    profile = read_profile(directory / "profile.json")
    assert content["model"]["name"] == "tiny"
    assert len(content["model"]["fingerprint"]) == 64
    assert sum(content["routing"]["tokens"].values()) == TOKENS
    assert set(content["routing"]["tokens"]) == {"en", "fr", "de", "es", "it"}
    assert [sum(row) for row in profile.use] == pytest.approx([2] * 6)
    assert set(profile.errors) == {"nf4", "fp4", "int8", "nf4/32", "nf4/128", "nf4/256"}
    assert content["replay"]["requests"] == TOKENS * 6 * 2
    assert content["budget"] == (NF4 + INT8) // 2
    kinds = [name for row in profile.precisions for name in row]
    assert set(kinds) == {"nf4", "int8"}
    assert abs(kinds.count("nf4") - kinds.count("int8")) <= 1
    # those that lose most of all in nf4 are among those held in int8
    worst = max(
        (error, layer, expert) for layer, row in enumerate(profile.errors["nf4"]) for expert, error in enumerate(row)
    )
    assert profile.precisions[worst[1]][worst[2]] == "int8"


def test_what_is_shown_goes_to_stdout_and_what_is_to_be_minded_to_stderr(calibrated):
    directory, done = calibrated
    for title in ("Use of experts", "Languages beside all text", "Hit rate by pool size", "Error against bytes"):
        assert title in done.out
    assert "experts shared with the previous token: " in done.out
    assert "are rough" not in done.err  # every expert had tokens enough
    assert "profile.json: written" in done.err
    assert sorted(path.name for path in directory.iterdir()) == ["pictures.svg", "profile.json"]
    assert (directory / "pictures.svg").read_text().startswith("<?xml")


def test_a_store_is_made_of_it_and_carries_it(calibrated, qmix, tmp_path):
    directory, _ = calibrated
    profile = read_profile(directory / "profile.json")
    made = qmix("quantize", "tiny", tmp_path / "store", "--profile", directory / "profile.json")
    assert made.status == 0, made.err
    store = open_store(tmp_path / "store")
    assert store.layout.precisions == profile.precisions
    assert store.profile == profile
    assert sum(store.layout.expert_bytes.values()) <= (NF4 + INT8) // 2
    planned = json.loads(qmix("plan", tmp_path / "store", "--json").out)
    assert planned["model"]["precisions"] == [list(row) for row in profile.precisions]
    said = qmix("generate", "-m", tmp_path / "store", "Click the", "--temperature", "0", "--max-new-tokens", "8")
    assert said.status == 0, said.err
    refused = qmix("plan", tmp_path / "store", "--profile", directory / "profile.json", "--precision", "nf4")
    assert refused.status == 2


@pytest.mark.slow
def test_what_it_chooses_loses_less_than_the_straight_line(calibrated, qmix):
    """The line goes from all experts in nf4 to all in int8; budgets lie at three points of it."""
    directory, _ = calibrated
    budgets = [NF4 + (INT8 - NF4) * part // 4 for part in (1, 2, 3)]
    options = [option for budget in budgets for option in ("--budget", str(budget))]
    ends = ("--precision", "nf4", "--precision", "int8", "--precision", "auto")
    profile = ("--profile", directory / "profile.json")
    done = qmix("compare", "tiny", *ends, *profile, *options, "--tokens", "2000", "--json")
    assert done.status == 0, done.err
    _, nf4, int8, auto, *mixed = json.loads(done.out)["rows"]
    assert [row["name"] for row in mixed] == ["auto in 7.73 MB", "auto in 9.17 MB", "auto in 10.6 MB"]
    for row, budget in zip(mixed, budgets, strict=True):
        assert row["expert_bytes"] <= budget
        along = (row["expert_bytes"] - nf4["expert_bytes"]) / (int8["expert_bytes"] - nf4["expert_bytes"])
        assert row["kl_mean"] < nf4["kl_mean"] + along * (int8["kl_mean"] - nf4["kl_mean"])
    assert auto | {"name": ""} == mixed[1] | {"name": ""}  # the budget that it was made with


def test_a_store_that_is_there_takes_a_profile_and_keeps_its_bytes(calibrated, qmix, tmp_path):
    directory, _ = calibrated
    store = tmp_path / "store"
    assert qmix("quantize", "tiny", store).status == 0
    assert open_store(store).profile is None
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    again = qmix("quantize", "tiny", store, "--profile", directory / "profile.json", "--precision", "nf4")
    assert "already there" in again.err
    assert open_store(store).profile == read_profile(directory / "profile.json")
    assert {name: (store / name).stat().st_mtime_ns for name in before} == before
    other = qmix("quantize", "tiny", store, "--profile", directory / "profile.json")
    assert other.status == 1
    assert "in another precision" in other.err


def test_a_damaged_profile_in_a_store_is_named(calibrated, qmix, tmp_path):
    directory, _ = calibrated
    store = tmp_path / "store"
    options = ("--profile", directory / "profile.json", "--precision", "nf4")
    assert qmix("quantize", "tiny", store, *options).status == 0
    (store / "profile.json").write_text("{")
    done = qmix("generate", "-m", store, "x")
    assert done.status == 1
    assert f"{store / 'profile.json'}: invalid JSON" in done.err
    assert "delete this file" in done.err


def test_a_profile_of_other_weights_is_refused(calibrated, qmix, tmp_path, tiny):
    directory, _ = calibrated
    content = json.loads((directory / "profile.json").read_text())
    content["model"]["fingerprint"] = "0" * 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    for command in (
        ("plan", "tiny"),
        ("quantize", "tiny", tmp_path / "store"),
        ("compare", "tiny", "--precision", "auto"),
    ):
        done = qmix(*command, "--profile", other)
        assert done.status == 2
        assert "whose weights are not this model's" in done.err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (("no/profile.json",), 2, "its directory does not exist"),
        (("p.json", "--plot", "p.pdf"), 2, "write it like calibration.png"),
        (("p.json", "--plot", "no/p.png"), 2, "its directory does not exist"),
        (("p.json", "--budget", "1MB"), 3, "give 6291456 bytes or more"),
        (("p.json", "--ram", "64MiB"), 3, "take fewer --tokens, or --ram"),
        (("p.json", "--text", "none.txt"), 2, "none.txt: No such file"),
        (("p.json", "--window", "5000"), 2, "--window 5000: must be at most 2048"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_refused_before_any_work(qmix, tmp_path, options, status, reason):
    done = qmix("calibrate", "tiny", *options, cwd=tmp_path)
    assert done.status == status
    assert reason in done.err
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_text_of_ones_own_has_no_language(qmix, tmp_path):
    (tmp_path / "text.txt").write_text("Click the button.\n---\nOpen the menu and click the icon.")
    done = qmix("calibrate", "tiny", tmp_path / "p.json", "--text", tmp_path / "text.txt")
    assert done.status == 0, done.err
    assert list(json.loads((tmp_path / "p.json").read_text())["routing"]["tokens"]) == ["text"]
    assert "Languages" not in done.out
    assert "fewer than 200 tokens went to 48 experts, such as 0.0, 0.1, 0.2, 0.3, 0.4, 0.5: " in done.err
