"""Fidelity of distributions by hand, by properties, and through the command."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from qmix.compare.fidelity import Scores, _tokens


def scores(*chunks: tuple[torch.Tensor, torch.Tensor, torch.Tensor], nbytes: int = 0) -> Scores:
    """Return scores from chunks of the reference's and a variant's log-probabilities and the next tokens."""
    return Scores("other", nbytes, *map(torch.cat, zip(*(_tokens(*chunk) for chunk in chunks), strict=True)))


def test_two_tokens_by_hand():
    """Reference (1/2, 1/2) against (3/4, 1/4), then (1, 1)/2 against itself; the next tokens are 0 and 1."""
    reference = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    other = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    found = scores((reference, other, torch.tensor([0, 1])), nbytes=7).fidelity()
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found.kl_worst == pytest.approx(first, rel=1e-6)
    assert found.kl_mean == pytest.approx(first / 2, rel=1e-6)
    assert found.kl_error == pytest.approx(first / 2, rel=1e-6)  # sd of (first, 0) is first / sqrt(2); over sqrt(2)
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.5)) / 2), rel=1e-6)
    assert (found.name, found.expert_bytes) == ("other", 7)


def test_top_1_is_the_share_of_equal_choices():
    reference = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]]).log()
    other = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]]).log()
    assert scores((reference, other, torch.tensor([0, 0, 0, 0]))).fidelity().top1 == 0.75


def test_chunks_add_up_to_the_whole():
    rng = torch.Generator().manual_seed(1)
    reference, other = (torch.randn(40, 9, generator=rng).log_softmax(-1) for _ in range(2))
    targets = torch.randint(0, 9, (40,), generator=rng)
    theirs = scores((reference, other, targets)).fidelity()
    ours = scores(*((reference[some], other[some], targets[some]) for some in torch.arange(40).split(7))).fidelity()
    expected = torch.nn.functional.kl_div(other, reference, log_target=True, reduction="batchmean").item()
    assert ours.kl_mean == pytest.approx(expected, rel=1e-5)
    assert ours.kl_mean == pytest.approx(theirs.kl_mean, rel=1e-9)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-6)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To install a package, open a terminal and type the command as root. " * 12, "utf-8")
    return path


def test_the_command_compares_precisions_with_half(qmix, text):
    specs = ("int8", "nf4", "nf4,0.*=int8")
    run = qmix(
        "compare", "tiny", "--text", text, "--window", "64", "--json", *(f"--precision={each}" for each in specs)
    )
    assert run.status == 0, run.err
    content = json.loads(run.out)
    assert content["schema"] == "qmix-compare-fidelity-1"
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["half", *specs]
    assert rows["half"]["kl_mean"] == 0
    assert rows["half"]["top1"] == 1
    assert 0 < rows["int8"]["kl_mean"] < rows["nf4,0.*=int8"]["kl_mean"] < rows["nf4"]["kl_mean"] < 1
    assert rows["nf4"]["expert_bytes"] < rows["nf4,0.*=int8"]["expert_bytes"] < rows["int8"]["expert_bytes"]


def test_the_command_shows_a_table_and_a_line(qmix, text):
    run = qmix("compare", "tiny", "--text", text, "--tokens", "80")
    assert run.status == 0, run.err
    lines = [line.split() for line in run.out.splitlines() if line.strip()]
    assert [line[0] for line in lines if line[0] in ("half", "nf4")] == ["half", "nf4"]
    assert "79 predicted tokens, windows of 1024, reference half" in run.err


def test_a_budget_that_is_too_small_is_refused_before_any_work(qmix, text):
    run = qmix("compare", "tiny", "--text", text, "--ram", "300MiB")
    assert run.status == 3
    assert run.out == ""
    smallest = re.search(r"take fewer --tokens, or --ram (\d+MiB)", run.err)[1]
    assert qmix("compare", "tiny", "--text", text, "--ram", smallest).status == 0


def test_a_window_longer_than_the_model_sees_is_refused(qmix, text):
    run = qmix("compare", "tiny", "--text", text, "--window", "4096")
    assert run.status == 2
    assert "--window 4096: must be at most 2048" in run.err


def test_without_a_text_the_bundled_ones_are_taken(qmix):
    from transformers import AutoTokenizer

    from calibration.corpus import Passage, alternating, bundled, windows
    from qmix.models import EMBEDDED

    run = qmix("compare", "tiny", "--tokens", "400", "--window", "128", "--json", "--precision", "int8")
    assert run.status == 0, run.err
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    whole = [Passage(None, tokenizer(document.text)["input_ids"]) for document in alternating(bundled())]
    cut = windows(whole, 128, 400)
    assert json.loads(run.out)["tokens"] == 400 - len(cut)
