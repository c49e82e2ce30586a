"""Profiles as files, and what they say of precisions: by hand, against brute force, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.errors import DoesNotFitError, QmixError, UsageError
from qmix.geometry import Geometry
from qmix.precision.record import record_layout
from qmix.store.allocation import Allocation, Allocator
from qmix.store.layout import parse_precisions
from qmix.store.profile import Profile, check_profile, precision_spec, read_profile, write_profile

SMALL = Geometry(1024, 4096, 2, 4, 2, 64, 4, 2, 96, 256)
USE = ((0.9, 0.5, 0.4, 0.2), (0.5, 0.5, 0.5, 0.5))
ERRORS = {
    "nf4": ((3.0, 1.0, 1.0, 1.0), (1.0, 2.0, 1.0, 1.0)),
    "fp4": ((2.0, 2.0, 2.0, 2.0), (2.0, 2.5, 2.0, 2.0)),
    "int8": ((0.1,) * 4, (0.1,) * 4),
    "nf4/32": ((0.5,) * 4, (0.5,) * 4),  # measured, but no store holds it
}
FOUR, EIGHT = (record_layout(SMALL, name, "bf16").nbytes for name in ("nf4", "int8"))
PROFILE = Profile("org/small", "abc", USE, ERRORS)


def refusal(call, *arguments, kind=UsageError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_example_of_the_docstring():
    allocator = Allocator({"nf4": [[5, 3]], "int8": [[1, 2]]}, {"nf4": 1, "int8": 2})
    assert allocator.frontier() == [(2, 8), (3, 4), (4, 3)]
    assert allocator.within(3) == Allocation((("int8", "nf4"),), 3, 4)
    assert allocator.within(100) == Allocation((("int8", "int8"),), 4, 3)
    assert allocator.smallest == 2
    with pytest.raises(DoesNotFitError, match="take at least 2 B; give 2 bytes or more") as caught:
        allocator.within(1)
    assert caught.value.smallest == 2


def test_what_costs_bytes_and_brings_nothing_is_not_taken():
    allocator = Allocator({"nf4": [[1, 0]], "int8": [[1, 0]]}, {"nf4": 1, "int8": 2})
    assert allocator.within(4) == Allocation((("nf4", "nf4"),), 2, 1)
    assert allocator.frontier() == [(2, 1)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=5),
    st.tuples(*[st.integers(1, 5)] * 4),
    st.integers(0, 25),
)
def test_no_choice_is_better(costs, sizes, budget):
    """All ways to hold up to five experts in four precisions, some of the same size."""
    names = ("nf4", "fp4", "int8", "half")
    errors = {name: [[row[index] for row in costs]] for index, name in enumerate(names)}
    allocator = Allocator(errors, dict(zip(names, sizes, strict=True)))
    every = [
        (sum(sizes[kind] for kind in kinds), sum(row[kind] for row, kind in zip(costs, kinds, strict=True)))
        for kinds in product(range(4), repeat=len(costs))
    ]
    fitting = [(error, nbytes) for nbytes, error in every if nbytes <= budget]
    if not fitting:
        with pytest.raises(DoesNotFitError) as caught:
            allocator.within(budget)
        assert caught.value.smallest == min(nbytes for nbytes, _ in every)
        return
    found = allocator.within(budget)
    assert (found.error, found.nbytes) == min(fitting)
    kinds = [names.index(name) for row in found.precisions for name in row]
    assert found.nbytes == sum(sizes[kind] for kind in kinds)
    assert found.error == sum(row[kind] for row, kind in zip(costs, kinds, strict=True))
    undominated = {
        (nbytes, error)
        for nbytes, error in every
        if not any((n <= nbytes and e < error) or (n < nbytes and e <= error) for n, e in every)
    }
    assert allocator.frontier() == sorted(undominated)


def test_a_profile_is_read_back_as_it_was_written(tmp_path):
    chosen = (("nf4", "int8", "nf4", "nf4"), ("half", "nf4", "nf4", "nf4"))
    profile = replace(PROFILE, precisions=chosen, policy="lru")
    write_profile(tmp_path / "profile.json", profile.to_json() | {"more": "for people"})
    assert read_profile(tmp_path / "profile.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    check_profile(profile, tmp_path, SMALL, "abc")
    check_profile(profile, tmp_path, SMALL, None)
    assert "no/profile.json: No such file" in refusal(
        write_profile, tmp_path / "no" / "profile.json", {}, kind=QmixError
    )


def test_auto_is_what_was_chosen_or_what_bytes_buy():
    chosen = (("nf4", "int8", "nf4", "nf4"), ("half", "nf4", "nf4", "nf4"))
    with_choice = replace(PROFILE, precisions=chosen)
    asked = (SMALL, "bf16")
    assert with_choice.spec(None, None, *asked) == "nf4,0.1=int8,1.0=half"
    assert with_choice.spec("auto", None, *asked) == "nf4,0.1=int8,1.0=half"
    assert with_choice.spec("fp4", None, *asked) == "fp4"
    assert PROFILE.spec(None, None, *asked) is None
    assert "give a budget" in refusal(PROFILE.spec, "auto", None, *asked)
    # in the fewest bytes the first expert is better held in fp4; then one, then the other of the dearest in int8
    assert with_choice.spec(None, 8 * FOUR, *asked) == "nf4,0.0=fp4"
    assert PROFILE.spec("auto", 7 * FOUR + EIGHT, *asked) in {"nf4,0.0=int8", "nf4,0.0=fp4,1.1=int8"}
    assert PROFILE.spec("auto", 6 * FOUR + 2 * EIGHT, *asked) == "nf4,0.0=int8,1.1=int8"
    assert PROFILE.spec("auto", 2**40, *asked) == "half"
    without = Profile("org/small", "abc", USE)
    assert "has no quantisation errors" in refusal(without.spec, "auto", 2**40, *asked)
    refusal(PROFILE.spec, None, 8 * FOUR - 1, *asked, kind=DoesNotFitError)


@given(
    st.lists(st.lists(st.sampled_from(["nf4", "fp4", "int8", "half"]), min_size=4, max_size=4), min_size=2, max_size=2)
)
def test_a_table_as_text_is_read_as_that_table(table):
    spec = precision_spec(table)
    assert parse_precisions(spec, SMALL) == tuple(map(tuple, table))


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (Profile("other", None, USE[:1]), "other layers or experts"),
        (Profile("other", "abd", USE), "weights are not this model's"),
        (Profile("small", None, ((1.5, 0.2, 0.2, 0.1), USE[1])), "not between 0 and 1"),
        (Profile("small", None, ((0.5, 0.5, 0.5, 0.2), USE[1])), "do not add up to 2"),
        (Profile("small", None, USE, {"nf4": USE[:1]}), "other layers or experts"),
        (Profile("small", None, USE, {"nf4": ((1.0, 1.0, 1.0, -1.0), USE[1])}), "not a number of at least 0"),
        (Profile("small", None, USE, {"nf4": ((1.0, 1.0, 1.0, float("nan")), USE[1])}), "not a number of at least 0"),
        (Profile("small", None, USE, precisions=(("nf4",) * 4, ("nf5",) * 4)), "a precision is not one of"),
        (Profile("small", None, USE, policy="clairvoyant"), "the policy 'clairvoyant' is not one of"),
    ],
)
def test_a_profile_of_something_else_is_refused(profile, reason):
    assert reason in refusal(check_profile, profile, Path("p.json"), SMALL, "abc")


@pytest.mark.parametrize("content", ["[]", "{", '{"schema": "qmix-profile-1"}', '{"schema": "qmix-profile-2"}', "\x00"])
def test_a_damaged_profile_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    assert refusal(read_profile, tmp_path / "p.json").startswith(f"{tmp_path / 'p.json'}: ")


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("model", 3, "model: expected object"),
        ("model", {"name": 3}, "model.name: expected str"),
        ("model", {"name": "a", "fingerprint": 3}, "model.fingerprint: expected str | null"),
        ("use", 3, "use: expected array"),
        ("use", [["a"]], "use[0][0]: expected float"),
        ("use", [[True]], "use[0][0]: expected float"),
        ("errors", 3, "errors: expected object"),
        ("errors", {"nf4": [[None]]}, "errors[...][0][0]: expected float"),
        ("precisions", 3, "precisions: expected array"),
        ("precisions", [[3]], "precisions[0][0]: expected str"),
        ("policy", 3, "policy: expected str"),
    ],
)
def test_a_profile_with_something_else_in_its_place_is_refused(tmp_path, key, value, place):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PROFILE.to_json() | {key: value}))
    assert refusal(read_profile, path).startswith(f"{path}: {place}")
