"""Reading the JSON files that plans are made of, by their schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmix.errors import UsageError


def read_object(path: Path, schema: str, what: str, again: str) -> dict[str, Any]:
    """The object in a file. Raises UsageError naming it where it is not `what`, and saying what to do (`again`)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path}: not valid JSON; is it {what}?") from None
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        raise UsageError(f"{path}: schema {found!r}, this qmix reads {schema!r}; {again}")
    whole: dict[str, Any] = content
    return whole
