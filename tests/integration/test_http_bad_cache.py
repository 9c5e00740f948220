"""Bad requests to the cache endpoints, one row each: right status, right shape, no harm done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.helpers.fake_client import INFO, VOCAB_SIZE
from tests.helpers.http import HELLO, in_process
from tests.integration.test_http_bad_input import BODIES, JSON, NESTED, Server, refusal, unharmed

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def server(anyio_backend: str) -> AsyncIterator[Server]:
    async with in_process() as (http, engine):
        made = Server(http, engine)
        await made.answer_golden()
        made.golden = await made.answer_golden()
        yield made


PROBE = "/v1/cache/probe"

PROBES: list[tuple[dict[str, Any], str | None, int, str | None]] = [
    ({}, "prompt", 400, "invalid_value"),
    ({"prompt": "a", "messages": HELLO}, "prompt", 400, "invalid_value"),
    ({"prompt": None, "messages": None}, "prompt", 400, "invalid_value"),
    *(
        ({"prompt": value}, "prompt", 400, "invalid_value")
        for value in ("", [], [[]], 3, True, {}, [""], [1, "a"], [1, True], [1, 1.5], ["a", 1])
    ),
    *(({"prompt": [1, value]}, "prompt", 400, None) for value in (-1, VOCAB_SIZE, 2**40, 10**30)),
    ({"prompt": [1] * (INFO.max_model_len + 1)}, "prompt", 400, "context_length_exceeded"),
    ({"prompt": "x" * (INFO.max_model_len + 1)}, "prompt", 400, "context_length_exceeded"),
    ({"prompt": "x" * (40 * INFO.max_model_len)}, "prompt", 400, "context_length_exceeded"),
    ({"prompt": ["a"] * 1000}, "prompt", 400, "invalid_value"),
    ({"prompt": [1] * 1_000_000}, None, 413, None),
    *(({"messages": value}, "messages", 400, "invalid_value") for value in ([], "hi", {}, HELLO * 3000)),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", 400, None),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", 400, None),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", 400, "context_length_exceeded"),
    ({"messages": HELLO, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", 400, None),
    ({"messages": HELLO, "add_generation_prompt": "no"}, "add_generation_prompt", 400, None),
    ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", 400, None),
    *(({"prompt": "a", "cache_salt": v}, "cache_salt", 400, None) for v in ("", "s" * 257, 3, ["s"], True)),
    ({"prompt": "a", "model": "other"}, "model", 404, "model_not_found"),
    ({"prompt": "a", "model": 3}, "model", 400, None),
    ({"messages": HELLO, "documents": [{"text": "x"}]}, "documents", 400, "unsupported_parameter"),
    ({"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template", 400, "unsupported_parameter"),
    ({"prompt": "a", "whatever": NESTED}, "whatever", 400, "invalid_json"),
]


@pytest.mark.parametrize(("body", "param", "status", "code"), PROBES, ids=lambda value: repr(value)[:40])
async def test_probes(
    server: Server, body: dict[str, Any], param: str | None, status: int, code: str | None
) -> None:
    error = refusal(await server.http.post(PROBE, json=body), status)
    assert error["param"] == param, error
    assert code in (None, error["code"])
    await unharmed(server)


@pytest.mark.parametrize("name", BODIES)
async def test_bodies_of_probes(server: Server, name: str) -> None:
    body, param = BODIES[name]
    error = refusal(await server.http.post(PROBE, content=body, headers=JSON), 400)
    assert (error["param"], error["code"]) == (param, "invalid_json")
    await unharmed(server)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e400"])
async def test_probes_with_numbers_that_are_none(server: Server, text: str) -> None:
    body = b'{"prompt": [1, ' + text.encode() + b"]}"
    assert refusal(await server.http.post(PROBE, content=body, headers=JSON), 400)["param"] == "prompt"
    await unharmed(server)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *((f"limit={value}", "limit") for value in ("0", "-1", "10001", "x", "1.0", "", "1e3", "+5", "٣")),
        *((f"limit={value}", "limit") for value in ("9" * 400, "NaN", "true", " 5", "0x10")),
        *((f"first_block={value}", "first_block") for value in ("0", "-1", "x", "", str(2**31), "9" * 5000)),
        *((f"state={value}", "state") for value in ("busy", "IN_USE", "cached,free", "%00", "x" * 4000)),
    ],
    ids=lambda value: value[:30],
)
async def test_pages_of_the_pool(server: Server, query: str, param: str) -> None:
    assert refusal(await server.http.get(f"/v1/cache?{query}"), 400)["param"] == param
    await unharmed(server)


@pytest.mark.parametrize("query", ["", "limit=10000", "first_block=2147483647", "state=", "unknown=1"])
async def test_good_pages(server: Server, query: str) -> None:
    assert (await server.http.get(f"/v1/cache?{query}")).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *((f"blocks/{number}", 404) for number in ("0", str(INFO.num_blocks), "2147483647")),
        *((f"blocks/{number}", 400) for number in ("-1", "x", "1.5", "9" * 400, "%00", "NaN", str(2**31))),
        *((path, 404) for path in ("blocks", "blocks/", "blocks/1/2", "blocks/..%2f1", "nothing", "events/")),
    ],
)
async def test_blocks_that_are_none(server: Server, path: str, status: int) -> None:
    url = httpx.URL("http://localhost", raw_path=f"/v1/cache/{path}".encode())
    error = refusal(await server.http.get(url), status)
    if "/" in path and status == 400:
        assert error["param"] == "block_id"
    await unharmed(server)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/cache"),
        ("DELETE", "/v1/cache"),
        ("GET", "/v1/cache/reset"),
        ("GET", PROBE),
        ("POST", "/v1/cache/events"),
        ("PUT", "/v1/cache/blocks/1"),
    ],
)
async def test_other_methods(server: Server, method: str, path: str) -> None:
    refusal(await server.http.request(method, path), 405)
    await unharmed(server)
