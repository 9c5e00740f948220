"""From an HTTP body to a JSON object that holds no surprises.

Knows bytes and JSON; does not know which fields a request may have. JSON as browsers and SDKs write it
is a subset of what `json.loads` takes: here NaN, duplicate keys, lone surrogates, other encodings, endless
nesting and endless digits are refused, each with a sentence that says where.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.errors import ApiError, shorten

# Above this a body is parsed in a thread, so that it does not hold up other streams.
_THREAD_BYTES = 1 << 18
# The parser holds the interpreter while it makes them: 50 000 take about 20 ms.
MAX_TEXTS = 50_000
_MAX_DEPTH = 64
_MAX_FIELDS = 1024

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_CHARSET = re.compile(r"charset\s*=\s*\"?([\w-]+)", re.IGNORECASE)


async def read_json(headers: Headers, receive: Receive, max_bytes: int, max_values: int) -> dict[str, Any]:
    """Reads and parses a request's body.

    Args:
        max_values: most values in it. A million tiny ones fit in a body of modest size, and take a hundred
            times longer to make and to look at than the same bytes as one text.

    Raises:
        ApiError: 415 for another type or encoding, 413 above a limit, 400 for what is not clean JSON.
        ClientDisconnect: the caller went away while sending.
    """
    check_type(headers)
    body = await read_body(receive, max_bytes)
    # Each value but the first of its list or object has a comma before it; commas in texts count too.
    if body.count(b",") > max_values:
        raise ApiError(413, f"The body holds more than {max_values} values.")
    if _texts(body) > MAX_TEXTS:
        raise ApiError(413, f"The body holds more than {MAX_TEXTS} texts and names of fields.")
    if len(body) > _THREAD_BYTES:
        return await asyncio.get_running_loop().run_in_executor(None, parse_object, body)
    return parse_object(body)


def _texts(body: bytes) -> int:
    """How many strings are in JSON: its quotation marks that no backslash takes the meaning from, by two."""
    if b"\\\\" in body:
        body = body.replace(b"\\\\", b"")
    return (body.count(b'"') - body.count(b'\\"')) // 2


def check_type(headers: Headers) -> None:
    """Raises 415 unless the body is said to be plain UTF-8 JSON."""
    content_type = headers.get("content-type", "")
    essence = content_type.split(";", 1)[0].strip().lower()
    if essence != "application/json" and not (
        essence.startswith("application/") and essence.endswith("+json")
    ):
        raise ApiError(415, "Send the body as JSON, with Content-Type: application/json.")
    charset = _CHARSET.search(content_type)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "The body must be UTF-8.")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "Compressed bodies are not supported; send it without Content-Encoding.")


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """Collects the body, giving up as soon as it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than this server's limit of {max_bytes} bytes.",
        headers={"connection": "close"},
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses one JSON object."""
    value = _parse(body)
    if not isinstance(value, dict):
        raise _bad("The body must be a JSON object.")
    return value


def _parse(body: bytes) -> Any:
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _bad("The body must be UTF-8 without a byte order mark.")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as exc:
        raise _bad("The body is not valid UTF-8.") from exc
    except json.JSONDecodeError as exc:
        raise _bad(f"The body is not valid JSON: {exc.msg} (line {exc.lineno}, column {exc.colno}).") from exc
    except RecursionError as exc:
        raise _bad("The body is nested too deeply.") from exc
    except ValueError as exc:  # int() beyond Python's own digit limit
        raise _bad("The body holds a number with too many digits.") from exc
    _check_values(body, value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _bad("The body has the same key twice in one object.")
    return fields


def _check_values(body: bytes, value: Any) -> None:
    """Refuses what the parser takes but no request may hold, naming the top-level field it is in."""
    suspicious = _SURROGATE_ESCAPE.search(body) is not None
    fields = value.items() if isinstance(value, dict) else [("", value)]
    if len(fields) > _MAX_FIELDS:
        raise _bad(f"The body has more than {_MAX_FIELDS} fields.")
    for name, inner in fields:
        if suspicious and not _encodes(name):
            raise _bad("A key of the body holds half a surrogate pair.")
        flaw = _flaw(inner, 1, suspicious)
        if flaw:
            raise ApiError(400, f"{shorten(name)}: {flaw}.", param=shorten(name), code="invalid_json")


def _flaw(value: Any, depth: int, suspicious: bool) -> str | None:
    if isinstance(value, str):
        return "text with half a surrogate pair" if suspicious and not _encodes(value) else None
    if isinstance(value, float):
        return None if math.isfinite(value) else "not a finite number"
    if not isinstance(value, (dict, list)):
        return None
    if depth > _MAX_DEPTH:
        return f"nested more than {_MAX_DEPTH} levels deep"
    inner = (*value, *value.values()) if isinstance(value, dict) else value
    # Long lists of token ids are the common case and have nothing to look into.
    flaws = (_flaw(item, depth + 1, suspicious) for item in inner if type(item) is not int)
    return next((flaw for flaw in flaws if flaw), None)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
