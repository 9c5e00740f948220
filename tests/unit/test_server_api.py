"""Small promises of the API: ids, warnings, logs, docs, parameters that reach the engine."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from engine.types import SamplingParams
from server.settings import ServerSettings
from tests.helpers.fake_client import END, SYSTEM, USER, FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, frames, in_process

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def params_of(path: str, body: dict[str, Any]) -> SamplingParams:
    async with in_process() as (http, client):
        reply = await http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return client.submitted[-1][2]


async def test_defaults() -> None:
    assert await params_of(CHAT, {"messages": HELLO}) == SamplingParams()
    assert await params_of(COMPLETIONS, {"prompt": "a"}) == SamplingParams(max_tokens=16)


async def test_logprobs_by_api() -> None:
    chat = await params_of(CHAT, {"messages": HELLO, "logprobs": True})
    assert (chat.logprobs, chat.prompt_logprobs) == (0, None)
    top = await params_of(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 3})
    assert top.logprobs == 3
    echo = await params_of(COMPLETIONS, {"prompt": "ab", "logprobs": 2, "echo": True})
    assert (echo.logprobs, echo.prompt_logprobs) == (2, 2)


async def test_messages_reach_the_template() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
    ]
    async with in_process() as (http, client):
        reply = await http.post(CHAT, json={"messages": messages, "add_generation_prompt": False})
        assert reply.status_code == 200, reply.text
    ids = client.submitted[-1][1]
    assert ids[:10] == [SYSTEM, *b"be brief", END]
    assert ids[10:15] == [USER, *b"a\nb", END] and ids[-1] == END


async def test_a_long_text_is_tokenised_elsewhere_with_the_same_result() -> None:
    text = "x" * 2000 + " " * 2000
    async with in_process(FakeClient(lambda ids, params, index: str(len(ids)))) as (http, client):
        client._info = type(client.info)(
            **{**_fields(client.info), "max_model_len": 9000, "largest_request_tokens": 9000}
        )
        reply = await http.post(CHAT, json={"messages": [{"role": "user", "content": text}]})
    assert reply.json()["choices"][0]["message"]["content"] == "4003"


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in type(info).__dataclass_fields__}


async def test_ids_are_our_own_and_the_callers_is_echoed_if_harmless() -> None:
    async with in_process() as (http, client):
        first = await http.post(CHAT, json={"messages": HELLO}, headers={"x-request-id": "trace-1:a.b_c"})
        assert first.headers["x-request-id"] == "trace-1:a.b_c"
        assert first.json()["id"].startswith("chatcmpl-") and "trace" not in client.submitted[-1][0]
        for bad in ("a b", "x" * 129, "a\tb", "<script>", "ü".encode().decode("latin-1")):
            reply = await http.get("/version", headers={"x-request-id": bad.encode("latin-1")})
            assert re.fullmatch(r"req-[0-9a-f]{16}", reply.headers["x-request-id"])


async def test_unknown_fields_are_named_in_a_header() -> None:
    body = {"messages": HELLO, "zeta": 1, "alpha\r\nset-cookie: x": 2, "Ünïcode": 3, "a" * 500: 4}
    async with in_process() as (http, _):
        for stream in (False, True):
            reply = await http.post(CHAT, json={**body, "stream": stream})
            warning = reply.headers["x-quire-warnings"]
            assert warning.startswith("ignored fields: ") and "zeta" in warning and len(warning) < 500
            assert "\n" not in warning and "set-cookie" not in reply.headers
        assert "x-quire-warnings" not in (await http.post(CHAT, json={"messages": HELLO})).headers
        many = await http.post(CHAT, json={"messages": HELLO, **{f"f{n}": 1 for n in range(50)}})
        assert many.headers["x-quire-warnings"].endswith("and 42 more")


async def test_streams_are_not_buffered_by_proxies() -> None:
    async with in_process() as (http, _):
        reply = await http.post(CHAT, json={"messages": HELLO, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache" and "content-length" not in reply.headers
    assert all(json.dumps(chunk) for chunk in frames(reply.text))


async def test_the_access_log_is_one_safe_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quire.access"):
        async with in_process(settings=ServerSettings(api_keys=("k",))) as (http, _):
            headers = {"authorization": "Bearer k"}
            secret = {"messages": [{"role": "user", "content": "my secret prompt"}]}
            await http.post(CHAT, json=secret, headers=headers)
            await http.get("/a%0ab%1b[31m" + "c" * 500 + "?key=k", headers=headers)
            await http.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "quire.access"]
    assert len(lines) == 2
    assert f"POST {CHAT} 200" in lines[0]
    assert "\\n" in lines[1] and "\\u001b" in lines[1] and len(lines[1]) < 300
    for line in lines:
        assert "\n" not in line and "\x1b" not in line and "secret" not in line and "key=" not in line


async def test_docs_need_no_network() -> None:
    async with in_process() as (http, _):
        page = (await http.get("/docs")).text
        document = (await http.get("/openapi.json")).json()
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page), "nothing is fetched from elsewhere"
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
        "/version",
    ):
        assert path in page and path in document["paths"]
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert chat["temperature"]["default"] == 1.0
    assert "min_p" in page and "repetition_penalty" in page
    assert "422" not in json.dumps(document)


async def test_docs_do_not_echo_a_hostile_host() -> None:
    async with in_process() as (http, _):
        assert (await http.get("/docs", headers={"host": "<script>"})).status_code == 400


async def test_a_model_without_a_template() -> None:
    import httpx

    from server.app import create_app
    from tests.helpers.fake_client import FakeTokenizer

    app = create_app(FakeClient(), ServerSettings(), FakeTokenizer())
    async with app.router.lifespan_context(app):
        await app.state.service.started.wait()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            chat = await http.post(CHAT, json={"messages": HELLO})
            assert chat.status_code == 400 and chat.json()["error"]["code"] == "no_chat_template"
            assert (await http.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200
