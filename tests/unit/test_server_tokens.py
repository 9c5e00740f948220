"""/tokenize and /detokenize: vLLM's shapes, a key like everywhere, and no harm from what is long or wrong."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from server.prompts import INLINE_CHARS
from server.routes.tokens import MAX_CHARS
from server.settings import ServerSettings
from tests.contract.openai_schema import check
from tests.helpers.fake_client import ASSISTANT, END, INFO, USER, VOCAB_SIZE, FakeTokenizer
from tests.helpers.http import HELLO, in_process

pytestmark = pytest.mark.anyio

TEXT = {"prompt": "hé"}
NESTED: Any = {}
for _ in range(200):
    NESTED = {"a": NESTED}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def post(path: str, body: dict[str, Any], settings: ServerSettings | None = None) -> Any:
    async with in_process(settings=settings) as (http, client):
        reply = await http.post(path, json=body)
        assert not client.submitted
        return reply


async def test_a_text() -> None:
    reply = await post("/tokenize", TEXT)
    ids = list("hé".encode())
    expected = {"count": 3, "max_model_len": INFO.max_model_len, "tokens": ids, "token_strs": None}
    assert reply.status_code == 200 and reply.json() == expected
    strings = await post("/tokenize", {**TEXT, "return_token_strs": True})
    assert strings.json() == {**expected, "token_strs": ["h", "\ufffd", "\ufffd"]}
    assert (await post("/tokenize", {"prompt": ""})).json()["tokens"] == []


async def test_a_conversation() -> None:
    hello = [USER, *b"hello", END]
    reply = await post("/tokenize", {"messages": HELLO, "return_token_strs": True})
    assert reply.json()["tokens"] == [*hello, ASSISTANT]
    assert reply.json()["token_strs"][0] == "<|user|>"
    reply = await post("/tokenize", {"messages": HELLO, "add_generation_prompt": False})
    assert reply.json()["tokens"] == hello
    reply = await post("/tokenize", {"messages": HELLO, "continue_final_message": True})
    assert reply.json()["tokens"] == hello[:-1]


async def test_there_and_back() -> None:
    async with in_process() as (http, _):
        for text in ("", "hello", "日本 😀", "\0"):
            tokens = (await http.post("/tokenize", json={"prompt": text})).json()["tokens"]
            assert (await http.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": text}
        reply = await http.post("/detokenize", json={"tokens": [USER, *b"hi", END]})
        assert reply.json() == {"prompt": "<|user|>hi<|end|>"}


async def test_what_is_long_is_done_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    encode, decode = FakeTokenizer.encode, FakeTokenizer.decode

    def spy(work: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return work(*args, **kwargs)

        return call

    monkeypatch.setattr(FakeTokenizer, "encode", spy(encode))
    monkeypatch.setattr(FakeTokenizer, "decode", spy(decode))
    for path, body in (
        ("/tokenize", {"prompt": "x" * (INLINE_CHARS + 1)}),
        ("/tokenize", {"prompt": "x" * 1_000_000}),
        ("/detokenize", {"tokens": [120] * INLINE_CHARS}),
    ):
        reply = await post(path, body)
        assert reply.status_code == 200
        assert reply.json().get("count", len(reply.json().get("prompt", ""))) >= INLINE_CHARS
    assert threads and threading.get_ident() not in threads


BAD = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {**TEXT, "messages": HELLO}, "prompt"),
    ("/tokenize", {"prompt": 3}, "prompt"),
    ("/tokenize", {"prompt": ["a"]}, "prompt"),
    ("/tokenize", {"prompt": "x" * (MAX_CHARS + 1)}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": "x" * (MAX_CHARS + 99)}]}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ("/tokenize", {**TEXT, "return_token_strs": 1}, "return_token_strs"),
    ("/tokenize", {**TEXT, "add_special_tokens": "no"}, "add_special_tokens"),
    ("/tokenize", {**TEXT, "chat_template": "{{ 1 }}"}, "chat_template"),
    ("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ("/tokenize", {**TEXT, "x": NESTED}, "x"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "abc"}, "tokens"),
    ("/detokenize", {"tokens": [1, -1]}, "tokens"),
    ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
    ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
    ("/detokenize", {"tokens": None}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=lambda value: str(value)[:40])
async def test_bad_input(path: str, body: dict[str, Any], param: str) -> None:
    reply = await post(path, body)
    assert reply.status_code == 400, reply.text[:300]
    check("ErrorResponse", reply.json())
    assert reply.json()["error"]["param"] == param
    assert len(reply.json()["error"]["message"]) < 300


@pytest.mark.parametrize(("path", "body"), [("/tokenize", TEXT), ("/detokenize", {"tokens": [65]})])
async def test_as_everywhere(path: str, body: dict[str, Any]) -> None:
    """A model that is served, a key, JSON, fields that are known, POST; and not before the model is there."""
    unknown = {**body, "tokenss": 1}
    reply = await post(path, {**body, "model": "other"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert (await post(path, {**body, "model": "quire-demo"})).status_code == 200
    assert "tokenss" in (await post(path, unknown)).headers["x-quire-warnings"]
    assert (await post(path, unknown, ServerSettings(strict=True))).status_code == 400
    keyed = ServerSettings(api_keys=("k",))
    assert (await post(path, body, keyed)).status_code == 401
    async with in_process(settings=keyed) as (http, _):
        reply = await http.post(path, json=body, headers={"authorization": "Bearer k"})
        assert reply.status_code == 200
        reply = await http.post(path, content=b"{}", headers={"authorization": "Bearer k"})
        assert reply.status_code == 415
        assert (await http.get(path, headers={"authorization": "Bearer k"})).status_code == 405
    async with in_process(wait=False) as (http, client):
        client.start_gate.clear()
        assert (await http.post(path, json=body)).status_code == 503
        client.start_gate.set()
