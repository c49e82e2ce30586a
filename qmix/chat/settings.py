"""Settings of a chat's answers, typed and saved: the fields of Sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qmix.errors import UsageError

DEFAULT = "default"
NUMBERS: dict[str, Callable[[str], int | float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_new_tokens": int,
    "seed": int,
    "draft_ngram": int,
}
TYPES = {name: (int, kind) for name, kind in NUMBERS.items()} | {"ignore_eos": (bool,)}
NAMES = (*NUMBERS, "stop")


def parse_setting(text: str) -> tuple[str, Any]:
    """Return name and value of `temperature 0.7`, the name and None of `temperature default`. Raises UsageError."""
    name, _, value = text.strip().partition(" ")
    name, value = name.replace("-", "_").lower(), value.strip()
    if name not in NAMES:
        raise UsageError(f"/set {name}: unknown setting; choose one of {', '.join(NAMES)}")
    if not value:
        raise UsageError(f"/set {name}: give a value, or {DEFAULT}")
    if value == DEFAULT:
        return name, None
    if name == "stop":
        return name, (_unescaped(value),)
    try:
        return name, NUMBERS[name](value)
    except ValueError:
        raise UsageError(f"/set {name} {value}: give a number, or {DEFAULT}") from None


def _unescaped(value: str) -> str:
    if not value.isascii():
        return value
    try:
        return value.encode().decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise UsageError(f"/set stop {value}: {error.reason}; write \\\\ for a backslash") from None


def saved_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _saved(value) for name, value in settings.items()}


def _saved(value: Any) -> Any:
    if isinstance(value, dict):  # biases by token id
        return {str(token): bias for token, bias in value.items()}
    return list(value) if isinstance(value, tuple) else value


def restored_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings. Raises ValueError where a name is unknown or a value has the wrong type."""
    found: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "stop" and isinstance(value, list) and all(isinstance(text, str) for text in value):
            found[name] = tuple(value)
        elif name == "logit_bias" and isinstance(value, dict):
            found[name] = {int(token): float(bias) for token, bias in value.items()}
        elif type(value) in TYPES.get(name, ()):
            found[name] = value
        else:
            raise ValueError(f"the setting {name!r}")
    return found
