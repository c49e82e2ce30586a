"""Types of parameters: sizes, rates and biases of tokens."""

from __future__ import annotations

from typing import Any

import click

from qmix.errors import UsageError
from qmix.units import UnitSystem, is_binary, parse_bytes, parse_flops, parse_rate


def speak_as(typed: object) -> None:
    """Make messages use the unit system of a size that was typed; binary units win where both are."""
    if isinstance(typed, str) and is_binary(typed):
        UnitSystem.binary = True


class Size(click.ParamType[int]):
    """A parameter in bytes, such as 12GiB."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        speak_as(value)
        try:
            return parse_bytes(value)
        except UsageError as error:
            self.fail(str(error), parameter, context)


class Rate(click.ParamType[float]):
    """A parameter in bytes/s, such as 25GB/s, or in FLOP/s."""

    name = "rate"

    def __init__(self, flops: bool = False) -> None:
        self.parse = parse_flops if flops else parse_rate

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            return self.parse(value)
        except UsageError as error:
            self.fail(str(error), parameter, context)


class Bias(click.ParamType[tuple[int, float]]):
    """A token id and what is added to its logit, such as 1234=-2.5."""

    name = "bias"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r}: give a token id and a number, such as 1234=-2.5", parameter, context)
