"""Errors that a client receives, in OpenAI's form and in Anthropic's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qmix.disk.faults import disk_advice
from qmix.errors import QmixError, UsageError

INVALID = "invalid_request_error"
CONTEXT = "context_length_exceeded"
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
NAMED = re.compile(r"(?:messages\[\d+\]: )?unknown field '([^']+)'|([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)*)(?= |:)")


@dataclass(eq=False)
class ApiError(Exception):
    """A request that cannot be answered: the status, OpenAI's type, code and parameter, and headers."""

    status: int
    message: str
    kind: str = INVALID
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def openai(self) -> dict[str, Any]:
        """Return the body of OpenAI's answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Return the body of Anthropic's answer, and the data of its error event."""
        kind = ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else INVALID)
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(message: str, param: str | None = None) -> ApiError:
    """Return the error of a request that is wrong; without `param` it is the field that the message begins with."""
    if param is None and (match := NAMED.match(message)):
        param = match[1] or match[2]
    return ApiError(400, message, param=param)


def too_long(message: str, param: str) -> ApiError:
    """Return OpenAI's error for a prompt and answer that do not fit the context."""
    return ApiError(400, message, code=CONTEXT, param=param)


def busy(message: str, seconds: int) -> ApiError:
    """Return the error of a request for which there is no room now; `seconds` is when to try again."""
    return ApiError(429, message, "rate_limit_error", "server_busy", headers={"Retry-After": str(seconds)})


def failed(message: str) -> ApiError:
    """Return the error of a request that failed here."""
    return ApiError(500, message, "server_error")


def told(error: Exception) -> ApiError:
    """Return the error that a client receives for a failure."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):  # found when it began, as a grammar that cannot be compiled
        return invalid(str(error))
    if isinstance(error, QmixError):
        return failed(str(error))
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return ApiError(507, f"the server's disk: {error.strerror}; {disk_advice(error)}", "server_error")
    return failed(f"a bug in qmix: {type(error).__name__}: {error}")


def stopping() -> ApiError:
    """Return the error of a request that comes while the server ends."""
    return ApiError(503, "the server is stopping", "server_error", headers={"Retry-After": "30"})
