"""Cards by their names, and what follows from the figures that their vendor publishes."""

from __future__ import annotations

import pytest

from qmix.errors import UsageError
from qmix.machine.cards import CARDS, card_named, gpu_budget, typical_card

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("3060 12GB", "RTX 3060 12GB"),
        ("GeForce RTX 3060 8 GB", "RTX 3060 8GB"),
        ("4060ti 16gb", "RTX 4060 Ti 16GB"),
        ("rtx 4070 ti super", "RTX 4070 Ti Super"),
        ("a6000", "RTX A6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB SXM"),
        ("NVIDIA H100 PCIe", "H100 80GB PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H200", "H200"),
        ("H200 NVL", "H200 NVL"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_a_card_is_found_by_any_of_its_names(text, name):
    assert card_named(text).name == name


def test_every_card_is_found_by_its_own_name():
    assert [card_named(card.name) for card in CARDS] == list(CARDS)
    assert len({card.name for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RTX 3060", "may be RTX 3060 8GB or RTX 3060 12GB"),
        ("4060 Ti", "may be RTX 4060 Ti 8GB or RTX 4060 Ti 16GB"),
        ("A100 80GB", "may be A100 80GB PCIe or A100 80GB SXM"),
        ("RTX 4095", "nor a known card; the nearest (is|are) RTX 4090"),
        ("RTX 4090 Laptop GPU", "nor a known card; the nearest (is|are) RTX 4090"),
        ("RTX 3060 24GB", "nor a known card"),
        ("RX 7900 XTX", "cannot run qmix: it needs an NVIDIA GPU"),
        ("rx7900", "cannot run qmix: it needs an NVIDIA GPU with CUDA; use `none` to run on the CPU"),
        ("rx7900xtx", "cannot run qmix"),
        ("rx580", "cannot run qmix"),
        ("AMD Radeon RX 6800", "cannot run qmix"),
        ("Intel Arc A770", "cannot run qmix"),
        ("big", "neither a size like 24GiB nor a known card"),
    ],
)
def test_an_ambiguous_or_unknown_name_is_refused_with_the_nearest(text, message):
    with pytest.raises(UsageError, match=message):
        card_named(text)


def test_memory_tells_cards_of_one_name_apart():
    assert card_named("NVIDIA GeForce RTX 3060", int(11.6 * GIB)).name == "RTX 3060 12GB"
    assert card_named("NVIDIA GeForce RTX 4060 Ti", int(7.6 * GIB)).name == "RTX 4060 Ti 8GB"


def test_a_budget_is_a_size_or_a_card():
    assert gpu_budget(24 * GIB) == (24 * GIB, None)
    assert gpu_budget("24GiB") == (24 * GIB, None)
    assert gpu_budget("11.5 GB") == (11_500_000_000, None)
    assert gpu_budget("3060 12GB")[1] == card_named("RTX 3060 12GB")
    assert gpu_budget("4090") == (int(24 * GIB * 0.98), card_named("4090"))
    assert gpu_budget("T4") == (int(16 * GIB * 15 / 16 * 0.98), card_named("T4"))
    with pytest.raises(UsageError, match="'rx7900' cannot run qmix"):
        gpu_budget("rx7900")
    with pytest.raises(UsageError, match="did you mean 24GiB"):
        gpu_budget("24")


def test_rates_by_hand():
    found = card_named("RTX 4090").rates
    assert found["gpu_memory"] == pytest.approx(0.8 * 1008e9)
    assert found["gpu_matmul"] == pytest.approx(0.7 * 165.2e12)
    assert found["pcie"] == pytest.approx(0.85 * 16 * 1.969e9)
    assert card_named("4060").rates["pcie"] == pytest.approx(found["pcie"] / 2)  # 8 lanes


@pytest.mark.parametrize(
    ("size", "name"), [(24, "RTX 3090"), (23, "RTX 3090"), (12, "RTX 4070 Super"), (8, "RTX 2070"), (40, "RTX A6000")]
)
def test_a_size_is_taken_for_a_card_of_median_bandwidth(size, name):
    assert typical_card(size * GIB).bandwidth == card_named(name).bandwidth
    assert typical_card(10**15).memory == 141
