from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.store.layout import parse_precisions
from qmix.units import format_bytes, parse_bytes, parse_flops, parse_rate


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20000000000", 20_000_000_000),
        ("12GiB", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("12GI", 12 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("0.5KiB", 512),
        ("  3TiB ", 3 * 2**40),
        ("80b", 80),
        (12_000_000, 12_000_000),
        ("100000", 100_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "12 gigs",
        "12GiB!",
        "-1GB",
        "1e9",
        "1,5GB",
        "0",
        "0.0GiB",
        "0.0001",
        0,
        -5,
        "12 34",
        "1.",
        "9" * 400,
        "5 EiB",
        "5000000TiB",
        2**62 + 1,
    ],
)
def test_what_is_no_size_above_zero_is_refused_and_quoted(text: str | int) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    quoted = repr(text) if len(repr(text)) <= 42 else f"{repr(text)[:40]}…"
    assert str(caught.value).startswith(f"{quoted} is not a size")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("read", "text", "meant"),
    [
        (parse_bytes, "64", "64GiB"),
        (parse_bytes, 64, "64GiB"),
        (parse_bytes, " 24 ", "24GiB"),
        (parse_bytes, "1.5", "1.5GiB"),
        (parse_bytes, "65536", "65536MiB"),
        (parse_rate, "3.5", "3.5GB/s"),
        (parse_rate, "25/s", "25GB/s"),
        (parse_flops, "80", "80TFLOP/s"),
    ],
)
def test_a_number_without_a_unit_that_cannot_be_meant_asks_for_one(read, text, meant) -> None:
    with pytest.raises(UsageError, match=rf"did you mean {meant}\?$"):
        read(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (80, "80 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (512_000, "512 kB"),
        (1_234_567, "1.23 MB"),
        (160_432_128, "160 MB"),
        (71_873_593_344, "71.9 GB"),
        (281_241_268_224, "281 GB"),
        (999_950_000, "1000 MB"),
        (1_500_000_000_000_000, "1500 TB"),
        (-2_500_000, "-2.5 MB"),
    ],
)
def test_counts_are_shown_with_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 10**17))
def test_a_shown_count_reads_back_within_its_rounding(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize("spec", ["x" * 3000, "nf4," + "y" * 3000, "nf4," + "9" * 3000 + ".*=int8"])
def test_a_long_precision_is_quoted_in_part(spec: str) -> None:
    geometry = Geometry(64, 128, 2, 4, 2, 16, 4, 2, 96, 256)
    with pytest.raises(UsageError) as caught:
        parse_precisions(spec, geometry)
    assert len(str(caught.value)) < 200
