"""The error table: every leaf of the engine's tree has a row, and nothing internal gets out."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from engine import errors
from server.errors import TABLE, ApiError, shorten, to_api_error
from tests.contract.openai_schema import check

EXPECTED = {
    errors.ConfigError: (500, "configuration_error"),
    errors.ModelError: (500, "configuration_error"),
    errors.MemoryPlanError: (500, "configuration_error"),
    errors.InvalidRequest: (400, "invalid_value"),
    errors.ContextTooLong: (400, "context_length_exceeded"),
    errors.NeverFits: (400, "request_too_large"),
    errors.Overloaded: (429, "queue_full"),
    errors.Draining: (503, "shutting_down"),
    errors.RequestFailed: (500, "request_failed"),
    errors.EngineDead: (503, "engine_unavailable"),
}


def tree(cls: type[errors.QuireError]) -> Iterator[type[errors.QuireError]]:
    for child in cls.__subclasses__():
        yield child
        yield from tree(child)


def made(cls: type[errors.QuireError], message: str) -> errors.QuireError:
    return cls(message, retry_after_s=7.4) if cls is errors.Overloaded else cls(message)  # type: ignore[call-arg]


def test_every_leaf_has_a_row() -> None:
    ours = [cls for cls in tree(errors.QuireError) if cls.__module__ == "engine.errors"]
    assert set(ours) <= set(TABLE)
    assert {cls for cls in ours if not cls.__subclasses__()} <= set(EXPECTED)


@pytest.mark.parametrize("cls", EXPECTED)
def test_rows(cls: type[errors.QuireError]) -> None:
    error = to_api_error(made(cls, "a sentence"))
    assert (error.status, error.code) == EXPECTED[cls]
    check("ErrorResponse", json.loads(error.body()))
    assert ("retry-after" in error.headers) == (error.status in (429, 503))
    if not issubclass(cls, errors.RequestError):
        assert "a sentence" not in error.message, "only RequestErrors are written for the caller"


def test_a_subclass_made_later_is_its_parents_row() -> None:
    class TooStrange(errors.InvalidRequest):
        pass

    error = to_api_error(TooStrange("too strange", "temperature"))
    assert (error.status, error.message, error.param) == (400, "too strange", "temperature")


def test_retry_after_is_a_sane_whole_number() -> None:
    for given, shown in ((0.0, "1"), (7.4, "7"), (1e9, "600")):
        assert to_api_error(errors.Overloaded("x", given)).headers["retry-after"] == shown


def test_texts_from_requests_are_cut_and_escaped() -> None:
    assert shorten("a" * 100) == "a" * 64 + "..."
    assert shorten("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"


def test_a_plain_reply_has_its_length() -> None:
    error = ApiError(431, "too long")
    assert (b"content-length", str(len(error.body())).encode()) in error.raw_headers()
