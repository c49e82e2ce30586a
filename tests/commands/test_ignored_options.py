"""Options that another option makes meaningless are refused with one line, before any work, and none is ignored."""

from __future__ import annotations

import json

import pytest

ONE = "not used with --compare, which names each machine's own; leave it out"
NO_GPU = "there is no GPU in this plan; give --gpu, or leave it out"
SAID = "the plan sets it already; leave one of them out"
MENDED = "a store is repaired as it was made; leave it out"
PAIRS = [
    ("plan tiny --compare 16GiB --ram 8GiB", f"--ram: {ONE}"),
    ("plan tiny --compare 16GiB --gpu none", f"--gpu: {ONE}"),
    ("plan tiny --compare 16GiB --verify", f"--verify: {ONE}"),
    ("plan tiny --gpu none --pcie 25GB/s", f"--pcie: {NO_GPU}"),
    ("plan tiny --gpu none --gpu-memory 900GB/s", f"--gpu-memory: {NO_GPU}"),
    ("plan tiny --compare 16GiB --gpu-matmul 80T", f"--gpu-matmul: {NO_GPU}"),
    ("plan tiny --gpu none --gpu 24GiB", "--gpu none: not together with other GPUs; leave one of them out"),
    ("plan tiny --budget 30GB", "--budget: needs a --profile with the quantisation errors of the experts"),
    *(
        (f"{command} --plan PLAN --{option} {value}", f"--plan and --{option}: {SAID}")
        for command in ("generate x", "chat", "batch IN -o OUT", "bench", "eval")
        for option, value in (("ram", "8GiB"), ("context", "64"))
    ),
    *(
        (f"{command} --plan PLAN --gpu 24GiB", f"--plan and --gpu: {SAID}")
        for command in ("generate x", "chat", "bench")
    ),
    ("chat --system x --system-file y", "--system and --system-file: give only one of them"),
    ("batch IN -o - --json", "--json: stdout has the answers; write them to a file with -o, or leave it out"),
    (
        "compare tiny --precision int8 --clip",
        "--clip: --precision has no 4-bit experts (nf4, fp4)",
    ),
    (
        "compare tiny --precision nf4 --profile PROFILE",
        "--profile: not used without --precision auto or --budget; give one, or leave it out",
    ),
    ("quantize tiny S --precision nf4 --budget 30GB", "--budget and --precision nf4: leave one of them out"),
    ("quantize tiny S --evict", "--evict: tiny is not on the hub; your own files are never deleted"),
    ("quantize tiny S --from tiny", "--from: only for repairing a store; leave it out"),
    *((f"quantize STORE --{option}", f"--{option.split()[0]}: {MENDED}") for option in ("precision nf4", "evict")),
    ("doctor --self-test --json", "--json: not used with --self-test; leave it out"),
    ("doctor --self-test --no-measure", "--no-measure: not used with --self-test; leave it out"),
    ("doctor --self-test --directory .", "--directory: not used with --self-test; leave it out"),
]


@pytest.mark.parametrize(("line", "told"), PAIRS, ids=[line for line, _ in PAIRS])
def test_an_option_that_would_be_ignored_is_refused(commands, tmp_path, line, told):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "qmix.json").write_text("{}")  # not even looked at
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "b"}\n')
    use = [[0.25] * 8] * 6
    profile = {"schema": "qmix-profile-2", "model": {"name": "tiny", "fingerprint": None}, "use": use}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    names = {
        "PLAN": str(tmp_path / "plan.json"),
        "PROFILE": str(tmp_path / "profile.json"),
        "IN": str(tmp_path / "in.jsonl"),
        "OUT": str(tmp_path / "out.jsonl"),
        "STORE": str(tmp_path / "store"),
    }
    done = commands(*(names.get(word, word) for word in line.split()), cwd=tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.lines[-1].startswith(f"qmix: {told}")
    assert not (tmp_path / "out.jsonl").exists()


MEANT = [
    (("plan", "tiny", "--ram", "64"), "64GiB"),
    (("plan", "tiny", "--gpu", "24"), "24GiB"),
    (("plan", "tiny", "--disk", "500"), "500GiB"),
    (("plan", "tiny", "--compare", "24,64GiB"), "24GiB"),
    (("plan", "tiny", "--disk-read", "3.5"), "3.5GB/s"),
    (("plan", "tiny", "--pcie", "25"), "25GB/s"),
    (("plan", "tiny", "--gpu-matmul", "80"), "80TFLOP/s"),
    (("generate", "x", "--ram", "64"), "64GiB"),
    (("generate", "x", "--gpu", "24"), "24GiB"),
    (("chat", "--ram", "64"), "64GiB"),
    (("batch", "x", "-o", "y", "--ram", "64"), "64GiB"),
    (("bench", "--ram", "64"), "64GiB"),
    (("eval", "--ram", "64"), "64GiB"),
    (("compare", "--ram", "64"), "64GiB"),
    (("compare", "--budget", "30"), "30GiB"),
    (("calibrate", "tiny", "p", "--ram", "64"), "64GiB"),
    (("calibrate", "tiny", "p", "--budget", "30"), "30GiB"),
    (("quantize", "tiny", "s", "--budget", "30"), "30GiB"),
]


@pytest.mark.parametrize(("argv", "meant"), MEANT, ids=lambda each: each if isinstance(each, str) else " ".join(each))
def test_a_size_without_a_unit_asks_which_was_meant(commands, argv, meant):
    done = commands(*argv)
    assert (done.status, done.out) == (2, "")
    assert done.lines[-1].endswith(f"did you mean {meant}?")


def test_a_budget_without_a_unit_is_asked_about_from_python_too():
    import qmix
    from qmix.errors import UsageError

    with pytest.raises(UsageError, match="did you mean 64GiB"):
        qmix.load("tiny", ram=64)
