"""Unknown fields: named with what was perhaps meant, counted, and refused where the operator wants that."""

from __future__ import annotations

from typing import Any

import pytest

from server.schema.chat import ChatRequest
from server.settings import ServerSettings
from server.unknown import nearest
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process

pytestmark = pytest.mark.anyio

STRICT = ServerSettings(strict=True)
KNOWN = tuple(ChatRequest.model_fields)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topp", "top_p"),
        ("stop_sequences", "stop"),
        ("stop_token_id", "stop_token_ids"),
        ("enable_thinking", "chat_template_kwargs"),
        ("zeta", None),
        ("x" * 10_000, None),
        ("", None),
    ],
)
def test_the_nearest_name(written: str, meant: str | None) -> None:
    assert nearest(written, KNOWN) == meant


async def test_the_warning_suggests_a_name() -> None:
    async with in_process() as (http, _):
        reply = await http.post(CHAT, json={"messages": HELLO, "max_token": 3, "zeta": 1})
    assert reply.status_code == 200
    expected = "ignored fields: max_token (did you mean max_tokens?), zeta"
    assert reply.headers["x-quire-warnings"] == expected


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO}),
        (COMPLETIONS, {"prompt": "a"}),
        ("/v1/cache/probe", {"prompt": "a"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_strict(path: str, body: dict[str, Any], stream: bool) -> None:
    body = {**body, "stream": stream} if "cache" not in path else body
    async with in_process(settings=STRICT) as (http, client):
        good = await http.post(path, json=body)
        assert good.status_code == 200, good.text
        count = len(client.submitted)
        reply = await http.post(path, json={**body, "modell": "x", "zz": 1})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["param"], error["code"]) == ("modell", "unknown_parameter")
        assert error["message"] == "modell: unknown field (did you mean model?)."
        odd = await http.post(path, json={**body, "a\r\nb" + "x" * 500: 1})
        assert odd.status_code == 400 and len(odd.json()["error"]["message"]) < 200
        assert len(client.submitted) == count


async def test_strict_takes_what_is_ignored_on_purpose() -> None:
    async with in_process(settings=STRICT) as (http, _):
        reply = await http.post(CHAT, json={"messages": HELLO, "user": "u", "store": True, "metadata": {}})
    assert reply.status_code == 200 and reply.headers["x-quire-warnings"] == "ignored fields: store"


async def test_refused_and_unknown_fields_are_counted() -> None:
    for settings, status in ((None, 200), (STRICT, 400)):
        async with in_process(settings=settings) as (http, _):
            reply = await http.post(CHAT, json={"messages": HELLO, "a": 1, "b": 2})
            assert reply.status_code == status
            metrics = (await http.get("/metrics")).text
        assert 'quire_unknown_request_fields_total{api="chat"} 2.0' in metrics
